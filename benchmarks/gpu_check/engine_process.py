"""Runs a vLLM engine in its own process, which decodes on request."""

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
"""Modules to run: an engine that is timed, one whose tokens are compared, and vLLM's kernels on slots."""
MARK = "gpu-check: "
"""Prefix of an answer line. Duplicated from those modules: this package must not import them, as they import vLLM."""
ROOT = Path(__file__).parents[2]


class EngineFailed(RuntimeError):
    """Raised when an engine process ends or does not answer in time."""


class EngineProcess:
    """An engine process, which starts on construction; several may start concurrently.

    Args:
        module: `SPEED`, `TOKENS` or `KERNELS`.
        arguments: command-line arguments of the module.
        ends: deadline for its answers, of `time.monotonic`.
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
        """Waits for the next answer; the first one means that the engine is ready.

        Raises:
            EngineFailed: the process ended, with an error line of its stderr, or ran out of time.
        """
        try:
            answer = self.answers.get(timeout=max(0.0, self.ends - time.monotonic()))
        except queue.Empty:
            raise EngineFailed("out of time") from None
        if answer is None:
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors if line.strip()]
            named = [line for line in lines if "Error" in line]
            raise EngineFailed((named or lines or ["it ended without output"])[-1][-140:])
        return answer

    def decode(self) -> float:
        """Lets the engine decode once; returns tokens per second.

        Raises:
            EngineFailed: as `answer`.
        """
        assert self.process.stdin is not None
        with suppress(OSError):  # the process has ended, and `answer` raises the reason
            self.process.stdin.write("decode\n")
            self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        """Kills the process and its children, and waits for it to end."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()
