"""Generates load with vLLM's own `vllm bench serve`: prompts of several domains and lengths, Poisson arrivals."""

import json
import math
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.server import VLLM, Server
from vllm_adapmoe.calibrate.text import text_of
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import read_tokenizer

PACKAGES = ("aiohttp", "pandas")
"""Packages that `vllm bench serve` needs in addition to vLLM's own dependencies."""
HELD_OUT = Path(__file__).parents[1] / "examples" / "tiny_mixtral" / "heldout"
MIN_DOMAINS = 3
WARM_TOKENS = 8
FIGURES = {
    "output_tokens_per_second": "output_throughput",
    "requests_per_second": "request_throughput",
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "p50_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "itl_p50_ms": "p50_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "completed": "completed",
    "failed": "failed",
    "seconds": "duration",
    "output_tokens": "total_output_tokens",
    "prompt_tokens": "total_input_tokens",
}
"""Figures of one load, and their names in the result of `vllm bench serve`."""


@dataclass(frozen=True)
class Load:
    """Requests sent to a server, and how they arrive."""

    prompts: list[tuple[str, list[int]]]
    """Domain and token ids of each request, in order."""
    output_tokens: int
    """Output tokens per request."""
    concurrency: int
    """Maximum concurrent requests; further arrivals wait in the client, and their latency counts from when they are
    sent."""
    rate: float
    """Arrival rate, requests per second (Poisson); infinite: all at once."""
    seed: int
    """Random seed for the arrivals."""


def check_packages() -> None:
    """Checks that `vllm bench serve` can run.

    Raises:
        AdapMoEError: a package is missing.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise AdapMoEError(f"{package} is not installed; pip install vllm-adapmoe[serve]")


def domains(model: Path, text: Path | None) -> dict[str, list[int]]:
    """Returns the token ids of each `*.txt` in a folder by name; None: the held-out text of the bundled model.

    Raises:
        AdapMoEError: fewer than three files.
    """
    folder = HELD_OUT if text is None else text
    paths = sorted(folder.glob("*.txt"))
    if len(paths) < MIN_DOMAINS:
        raise AdapMoEError(
            f"--text {folder} has {len(paths)} *.txt; put at least {MIN_DOMAINS} into it, one per domain"
        )
    tokenizer = read_tokenizer(model)
    return {path.stem: tokenizer.encode(text_of(path), add_special_tokens=False).ids for path in paths}


def mixed_lengths(generator: random.Random, count: int, shortest: int, longest: int) -> list[int]:
    """Draws lengths log-uniformly: as many from 16 to 32 as from 256 to 512."""
    return [
        min(longest, max(shortest, round(math.exp(generator.uniform(math.log(shortest), math.log(longest))))))
        for _ in range(count)
    ]


def mixed_prompts(
    texts: dict[str, list[int]], count: int, shortest: int, longest: int, seed: int
) -> list[tuple[str, list[int]]]:
    """Returns (domain, token ids) of `count` excerpts, cycling through the domains; the same for the same seed."""
    generator = random.Random(seed)
    names = list(texts)
    prompts = []
    for number, length in enumerate(mixed_lengths(generator, count, shortest, longest)):
        name = names[number % len(names)]
        start = generator.randrange(max(1, len(texts[name]) - length))
        prompts.append((name, texts[name][start : start + length]))
    return prompts


def write_dataset(path: Path, model: Path, load: Load) -> None:
    """Writes a file for `vllm bench serve --dataset-name custom`; it sends text, so token ids are decoded."""
    tokenizer = read_tokenizer(model)
    lines = [
        json.dumps({"prompt": tokenizer.decode(ids, skip_special_tokens=False), "output_tokens": load.output_tokens})
        for _, ids in load.prompts
    ]
    path.write_text("\n".join(lines) + "\n")


def apply(load: Load, server: Server, dataset: Path) -> dict[str, float]:
    """Runs `vllm bench serve` against a server and returns its figures (`parse_result`).

    Args:
        load: requests to send.
        server: server under load.
        dataset: file from `write_dataset` for this load.

    Raises:
        AdapMoEError: `vllm bench serve` failed, or no request was answered.
    """
    requests = len(load.prompts)
    result = dataset.with_name(f"{server.name}.result.json")
    result.unlink(missing_ok=True)
    command = [
        *VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions",
        "--model", server.model, "--dataset-name", "custom", "--dataset-path", str(dataset), "--disable-shuffle",
        "--skip-chat-template", "--custom-output-len", "-1", "--no-oversample", "--num-prompts", str(requests),
        "--ignore-eos", "--temperature", "0", "--seed", str(load.seed), "--request-rate", str(load.rate),
        "--burstiness", "1", "--max-concurrency", str(load.concurrency), "--ready-check-timeout-sec", "0",
        "--disable-tqdm",
        "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99",
        "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode or not result.exists():
        last = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()][-1:]
        raise AdapMoEError(f"vllm bench serve ended with code {ended.returncode}: {''.join(last)[-300:]}")
    figures = parse_result(json.loads(result.read_text()))
    if not figures["completed"]:
        why = [line for line in ended.stdout.splitlines() if line.startswith("Error 0:")]
        raise AdapMoEError(f"server {server.name} answered none of {requests} requests: {''.join(why)[:300]}")
    return figures


def parse_result(result: dict[str, Any]) -> dict[str, float]:
    """Extracts the `FIGURES` from a result of `vllm bench serve --save-result`, mean concurrency and client queue time.

    Raises:
        AdapMoEError: a figure is missing.
    """
    missing = [key for key in (*FIGURES.values(), "latencies", "queue_times") if key not in result]
    if missing:
        raise AdapMoEError(f"the result of vllm bench serve has no {missing[0]}; this benchmark supports vLLM 0.32")
    waited = result["queue_times"]
    return {name: float(result[key]) for name, key in FIGURES.items()} | {
        "mean_concurrency": sum(result["latencies"]) / result["duration"],
        "mean_client_queue_ms": 1e3 * sum(waited) / max(1, len(waited)),
    }


def measure(server: Server, load: Load) -> dict[str, float]:
    """Warms a server with the first tokens of some answers, then loads it; returns figures and counters."""
    dataset = server.log.with_name(f"{server.name}.jsonl")
    write_dataset(dataset, Path(server.model), load)
    with ThreadPoolExecutor(load.concurrency) as pool:
        answers = [
            pool.submit(server.complete, prompt=ids, max_tokens=WARM_TOKENS, ignore_eos=True)
            for _, ids in load.prompts[: load.concurrency]
        ]
        for answer in answers:
            answer.result()
    before = server.metrics()
    started = time.monotonic()
    figures = apply(load, server, dataset)
    return figures | counted(before, server.metrics(), figures) | {"started": started, "ended": time.monotonic()}


def counted(before: dict[str, float], after: dict[str, float], figures: dict[str, float]) -> dict[str, float]:
    """Returns figures from a server's counters before and after a load; those of the cache only with the plugin."""

    def grown(name: str) -> float | None:
        return after[name] - before.get(name, 0.0) if name in after else None

    tokens = max(1.0, figures["output_tokens"])
    result = {
        "steps_per_output_token": (grown("vllm:iteration_tokens_total_count") or 0.0) / tokens,
        "preemptions": grown("vllm:num_preemptions_total") or 0.0,
    }
    hits, misses = grown("vllm:adapmoe_expert_hits_total"), grown("vllm:adapmoe_expert_misses_total")
    if hits is None or misses is None:
        return result
    stall = grown("vllm:adapmoe_fetch_stall_seconds_sum") or 0.0
    return result | {
        "hit_rate": hits / (hits + misses) if hits + misses else 1.0,
        "fetched_bytes_per_output_token": (grown("vllm:adapmoe_fetched_bytes_total") or 0.0) / tokens,
        "fetched_bytes": grown("vllm:adapmoe_fetched_bytes_total") or 0.0,
        "fetch_seconds": grown("vllm:adapmoe_fetch_seconds_total") or 0.0,
        "stall_seconds": stall,
        "stall_share": stall / figures["seconds"],
    }
