"""Who leaves when a slot is wanted: pure policies over expert keys."""

from collections import OrderedDict
from collections.abc import Container
from typing import Protocol

ExpertKey = tuple[int, int]
"""(MoE layer index, expert index within the layer)."""


class EvictionPolicy(Protocol):
    """Order of leaving. It sees every request for a resident expert, and never a tensor, a clock or a thread."""

    def insert(self, key: ExpertKey) -> None:
        """`key` has become resident."""

    def touch(self, key: ExpertKey) -> None:
        """The resident `key` was requested."""

    def remove(self, key: ExpertKey) -> None:
        """`key` is no longer resident."""

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey:
        """The resident key to leave next, none of `protected`.

        Raises:
            LookupError: every resident key is protected.
        """
        ...


class LRU:
    """Least recently used leaves first, over all layers of the pool."""

    def __init__(self) -> None:
        self.order: OrderedDict[ExpertKey, None] = OrderedDict()

    def insert(self, key: ExpertKey) -> None:
        self.order[key] = None

    def touch(self, key: ExpertKey) -> None:
        self.order.move_to_end(key)

    def remove(self, key: ExpertKey) -> None:
        del self.order[key]

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey:
        for key in self.order:
            if key not in protected:
                return key
        raise LookupError("every resident expert is in use")
