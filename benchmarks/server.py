"""Runs a `vllm serve` process to measure: starts it, pauses it while others run, reads its counters, ends it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.top.sample import parse_sample

START_SECONDS = 900
"""Time limit for a server to start, seconds: it may have to pack experts and compile."""
KV_CACHE_BYTES = 256 << 20
"""KV-cache bytes per server, so that several can live at once: by default vLLM takes nearly all memory."""
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def free_port() -> int:
    """Returns a free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A `vllm serve` process in its own process group, which ends with the `with` block.

    Args:
        name: name of the log file.
        model: checkpoint folder.
        folder: folder for the log.
        adapmoe: configuration of the expert cache; None: stock vLLM.
        flags: further arguments for `vllm serve`.

    Raises:
        AdapMoEError: the server does not start; the message has the first error in its log.
    """

    def __init__(
        self, name: str, model: Path, folder: Path, adapmoe: dict[str, Any] | None, flags: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.model = str(model)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        self.children: list[psutil.Process] = []
        method = () if adapmoe is None else ("--moe-method", "adapmoe", "--adapmoe-config", json.dumps(adapmoe))
        command = [*VLLM, "serve", self.model, "--host", "127.0.0.1", "--port", str(self.port), *flags, *method]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Self:
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                self.children = self.processes()[1:]
                return
            time.sleep(0.5)
        raise AdapMoEError(f"server {self.name} did not start: {first_error(self.log.read_text(errors='replace'))}")

    def processes(self) -> list[psutil.Process]:
        """Returns the server's process and its descendants, the server first."""
        with suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def pause(self) -> None:
        """Stops all its processes until `resume`: idle workers poll, and would take CPU time from the one measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resumes all its processes."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        for child in self.children:  # those that left the group
            with suppress(psutil.Error):
                child.send_signal(number)

    def close(self) -> None:
        """Ends the server and all its descendants."""
        self.resume()
        self.children = self.processes()[1:] or self.children
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        self._signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(self.children, timeout=5)

    def metrics(self) -> dict[str, float]:
        """Returns every sample of `/metrics` by name, summed over its labels, without buckets."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            return parse_sample(answer.read().decode(), time.monotonic()).values

    def complete(self, **fields: Any) -> dict[str, Any]:
        """Sends a request to `/v1/completions` and returns the answer, not streamed."""
        body = json.dumps({"model": self.model, "temperature": 0} | fields).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)


def end_cleanly() -> None:
    """Turns SIGTERM into KeyboardInterrupt, so that servers, which have their own sessions, are ended too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def first_error(log: str) -> str:
    """Returns the first exception in a log: the root cause, to which later ones refer."""
    lines = [line for line in log.splitlines() if " WARNING " not in line and " INFO " not in line]
    match = re.search(r"\b[\w.]*(?:[Ee]rror|Exception): .*", "\n".join(lines))
    return match[0].strip()[:300] if match else f"no answer after {START_SECONDS} s, and no error in the log"
