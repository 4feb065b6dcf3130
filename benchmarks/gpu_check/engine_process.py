"""A vLLM engine in a process of its own, told line by line to decode."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

SPEED, TOKENS = "vllm_adapmoe.integration.measure.gpu_check", "vllm_adapmoe.integration.measure.gpu_check_tokens"
KERNELS = "vllm_adapmoe.integration.measure.gpu_check_kernels"
"""Modules to run: an engine that decodes for the clock, one whose tokens are compared, vLLM's kernels on slots."""
MARK = "gpu-check: "
"""Before an answer; the same as there, where this package must not look: only `integration` imports vLLM."""
ROOT = Path(__file__).parents[2]


class EngineFailed(RuntimeError):
    """It ended, or did not answer in time."""


class EngineProcess:
    """Starts at once; several may start beside each other.

    Args:
        module: `SPEED`, `TOKENS` or `KERNELS`.
        arguments: of the module.
        ends: until when it may answer, of `time.monotonic`.
    """

    def __init__(self, module: str, arguments: Sequence[str], ends: float) -> None:
        self.ends = ends
        self.errors = TemporaryFile("w+")  # noqa: SIM115 - until `close`
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            start_new_session=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        self.answers: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.answers.put(json.loads(line.removeprefix(MARK)))
        self.answers.put(None)

    def answer(self) -> Any:
        """Waits for its next answer; the first says that it is ready.

        Raises:
            EngineFailed: with the last line that it wrote to its errors.
        """
        try:
            answer = self.answers.get(timeout=max(0.0, self.ends - time.monotonic()))
        except queue.Empty:
            raise EngineFailed("out of time") from None
        if answer is None:
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors if line.strip()]
            named = [line for line in lines if "Error" in line]
            raise EngineFailed((named or lines or ["it ended without a word"])[-1][-140:])
        return answer

    def decode(self) -> float:
        """Tokens per second.

        Raises:
            EngineFailed: `answer`.
        """
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended, and `answer` says why
            self.process.stdin.write("decode\n")
            self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        """Ends the process and its children, and waits for that."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()
