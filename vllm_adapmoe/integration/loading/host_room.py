"""Whether a store in host memory fits, before anything is loaded into it: beyond that a container is killed."""

from collections.abc import Sequence

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.planning.slot_budget import DeviceMemory, ExpertShape, bytes_of
from vllm_adapmoe.store.host_memory import HostMemory, host_memory
from vllm_adapmoe.units import GiB

LAYERS_AT_ONCE = 2
"""In memory beside their records: as they arrive, and as the kernel wants them."""


def check_host_room(
    shapes: Sequence[ExpertShape], layer_bytes: int, slots: Sequence[int], others: DeviceMemory | None, ranks: int
) -> None:
    """Refuses a host store that would not fit.

    Args:
        shapes: of this rank's experts, by pool.
        layer_bytes: of the experts of its largest layer.
        slots: of each pool.
        others: what this rank takes beside experts, if slots and all that are in host memory, too (on the CPU).
        ranks: on this machine, which all take as much.

    Raises:
        AdapMoEError: names what is needed for what, and what is available.
    """
    parts = {
        "experts": bytes_of(shapes, [shape.num_experts for shape in shapes]),
        f"{LAYERS_AT_ONCE} layers while they load": LAYERS_AT_ONCE * layer_bytes,
    }
    if others is not None:
        parts["slots"] = bytes_of(shapes, slots)
        parts["other weights, KV cache and activations"] = others.other_weights + others.kv_cache + others.activations
    needed, memory = sum(parts.values()) * ranks, host_memory()
    if needed > memory.available:
        raise AdapMoEError(refusal(parts, ranks, needed, memory))


def refusal(parts: dict[str, int], ranks: int, needed: int, memory: HostMemory) -> str:
    """Returns the one line for a user."""
    told = " + ".join(f"{nbytes / GiB:.2f} for {part}" for part, nbytes in parts.items() if nbytes)
    times = f" on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"store=host needs {needed} bytes ({needed / GiB:.2f} GiB) of host memory, {told}{times}; "
        f"{memory.available} bytes ({memory.available / GiB:.2f} GiB) are available, limited by {memory.limited_by}; "
        "use store=file"
    )
