"""Serves the bundled model with half of its experts resident, and compares its tokens with stock vLLM's.

make demo
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from vllm_adapmoe.bench.server import free_port

MODEL = Path(__file__).parent / "tiny_mixtral" / "model"
PROMPT = "#include <"
OUTPUT_TOKENS = 96
START_SECONDS = 240
BIN = Path(sys.executable).parent
console = Console()


class Server:
    """A real `vllm serve` in a process group of its own; ends with the `with` block."""

    def __init__(self, name: str, folder: Path, *flags: str) -> None:
        self.name = name
        self.port = free_port()
        self.log = folder / f"{name}.log"
        command = [
            BIN / "vllm", "serve", MODEL, "--served-model-name", "tiny-mixtral", "--host", "127.0.0.1",
            "--port", str(self.port), "--max-model-len", "1024", "--kv-cache-memory-bytes", str(256 << 20), *flags,
        ]  # fmt: skip
        console.print(f"[dim]$ vllm serve {MODEL.name} {' '.join(flags)}[/dim]", highlight=False, soft_wrap=True)
        self.process = subprocess.Popen(
            command, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(timeout=20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def wait(self) -> None:
        """Until the server answers; on failure its log is shown."""
        deadline = time.monotonic() + START_SECONDS
        with console.status(f"starting {self.name}"):
            while time.monotonic() < deadline and self.process.poll() is None:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                        return
                except OSError:
                    time.sleep(0.5)
        console.print(self.log.read_text()[-4000:], highlight=False, markup=False)
        raise SystemExit(f"demo: {self.name} did not start; the end of its log is above")

    def complete(self, show: bool) -> tuple[list[int], float]:
        """Token ids of one streamed completion, and decoded tokens per second."""
        client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")
        stream = client.completions.create(
            model="tiny-mixtral", prompt=PROMPT, max_tokens=OUTPUT_TOKENS, temperature=0, stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        tokens: list[int] = []
        first = 0.0
        if show:
            console.print(PROMPT, end="", style="cyan", highlight=False, markup=False)
        for chunk in stream:
            if not chunk.choices:
                continue
            first = first or time.monotonic()
            tokens += getattr(chunk.choices[0], "token_ids", None) or []
            if show:
                console.print(chunk.choices[0].text, end="", highlight=False, markup=False)
        return tokens, (len(tokens) - 1) / (time.monotonic() - first)

    def metric(self, name: str) -> float:
        """A metric of the expert cache, summed over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:adapmoe_{name}{{"))


def stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with interrupts ignored
        signal.signal(number, stop)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adapmoe-demo-")))
        config = json.dumps({"cache_fraction": 0.5, "store": "file", "store_dir": str(folder / "store")})
        offloaded = stack.enter_context(
            Server("vllm-adapmoe", folder, "--moe-method", "adapmoe", "--adapmoe-config", config)
        )
        stock = stack.enter_context(Server("stock-vllm", folder))
        offloaded.wait()
        for line in offloaded.log.read_text().splitlines():
            if "Expert cache:" in line:
                console.print("[dim]" + line[line.index("Expert cache:") :] + "[/dim]", highlight=False)
        stock.wait()
        console.print()
        tokens, speed = offloaded.complete(show=True)
        console.print("\n")
        reference, reference_speed = stock.complete(show=False)
        names = ("slots", "expert_hits_total", "expert_misses_total", "fetched_bytes_total")
        slots, hits, misses, fetched = (offloaded.metric(name) for name in names)

        same = tokens == reference and len(tokens) == OUTPUT_TOKENS
        table = Table(title="Half of the experts resident, the rest in a packed file", show_header=False)
        for name, value in {
            "slots": f"{slots:.0f}",
            "hits": f"{hits:.0f} ({hits / max(1, hits + misses):.1%})",
            "misses": f"{misses:.0f}",
            "fetched": f"{fetched / 2**20:.1f} MiB",
            "tokens/s": f"{speed:.1f} (stock vLLM, every expert in memory: {reference_speed:.1f})",
            "same tokens as stock vLLM": f"{OUTPUT_TOKENS} of {OUTPUT_TOKENS}" if same else "[red]NO[/red]",
        }.items():
            table.add_row(name, value)
        console.print(table)
        console.print(f"[dim]{time.monotonic() - started:.0f} s[/dim]")
    if not same:
        raise SystemExit("demo: the tokens differ from those of stock vLLM")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
