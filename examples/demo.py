"""Serves the bundled model with half of its experts resident, and compares its tokens with stock vLLM's.

make demo
"""

import argparse
import json
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from benchmarks.server import KV_CACHE_BYTES, Server, end_cleanly
from vllm_adapmoe.config import AdapMoEError

MODEL = Path(__file__).parent / "tiny_mixtral" / "model"
NAME = "tiny-mixtral"
PROMPT = "#include <"
OUTPUT_TOKENS = 96
console = Console()


class DemoServer(Server):
    """A `vllm serve` process with the bundled model."""

    def __init__(self, name: str, folder: Path, adapmoe: dict[str, Any] | None, *flags: str) -> None:
        options = "" if adapmoe is None else f" --moe-method adapmoe --adapmoe-config '{json.dumps(adapmoe)}'"
        console.print(f"[dim]$ vllm serve {MODEL.name}{options}[/dim]", highlight=False, soft_wrap=True)
        limits = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES))
        super().__init__(name, MODEL, folder, adapmoe, ("--served-model-name", NAME, *limits, *flags))

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stream(self, show: bool) -> tuple[list[int], float]:
        """Streams one completion; returns its token ids and decoded tokens per second."""
        stream = self.client().completions.create(
            model=NAME, prompt=PROMPT, max_tokens=OUTPUT_TOKENS, temperature=0, stream=True,
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    end_cleanly()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if the shell started this with interrupts ignored
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adapmoe-demo-")))
        config = {"cache_fraction": 0.5, "store": "file", "store_dir": str(folder / "store")}
        offloaded, stock = DemoServer("vllm-adapmoe", folder, config), DemoServer("stock-vllm", folder, None)
        for server in (offloaded, stock):  # both start concurrently, and both end if one fails
            stack.callback(server.close)
        for server in (offloaded, stock):
            with console.status(f"starting {server.name}"):
                stack.enter_context(server)
        for line in offloaded.log.read_text().splitlines():
            if "Expert cache:" in line:
                console.print("[dim]" + line[line.index("Expert cache:") :] + "[/dim]", highlight=False)
        console.print()
        tokens, speed = offloaded.stream(show=True)
        console.print("\n")
        reference, reference_speed = stock.stream(show=False)
        counted = offloaded.metrics()
        names = ("slots", "expert_hits_total", "expert_misses_total", "fetched_bytes_total")
        slots, hits, misses, fetched = (counted[f"vllm:adapmoe_{name}"] for name in names)

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
    except AdapMoEError as error:
        raise SystemExit(f"demo: {error}") from None
