"""Prints a user's mistake as one line instead of a traceback through vLLM."""

import sys
from types import TracebackType

from vllm_adapmoe.printable import OneLineError


def print_errors_as_one_line() -> None:
    """Installs an exception hook that prints a `OneLineError` as one line. Further calls in a process do nothing."""
    if getattr(sys.excepthook, "adapmoe", False):
        return
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, OneLineError):
            print(f"vllm-adapmoe: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook.adapmoe = True  # type: ignore[attr-defined]
    sys.excepthook = hook
