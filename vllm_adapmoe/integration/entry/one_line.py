"""Mistakes of the user end the program with one line instead of a traceback through vLLM."""

import sys
from types import TracebackType

from vllm_adapmoe.printable import OneLineError


def print_errors_as_one_line() -> None:
    """From here on; once per process, however often it is called."""
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
