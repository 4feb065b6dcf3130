"""Stresses a server and checks that nothing leaks, no request is lost and no token is wrong."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.serve_load import check_packages, domains
from benchmarks.server import KV_CACHE_BYTES, Server, first_error
from benchmarks.soak_client import Clients, Outcome
from benchmarks.soak_replay import CHANCE, chance_of_as_many, replay
from benchmarks.soak_traffic import WEIGHTS, Traffic
from benchmarks.soak_watch import EARLY, Sample, Watch, growth, sample
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.units import MiB

MAX_MODEL_LEN = 1024
BLOCKS_PER_CLIENT = 2
"""KV-cache blocks per client: too few for all clients at once, so that requests are also preempted."""
REST_SECONDS = 8
"""Seconds without requests before an idle sample, longer than the server keeps connections alive."""
WRONG_GAP = 1.0
"""Gap in nats between a replay's token and the original that rounding cannot explain; adjacent bfloat16 logits are up
to 0.125 apart."""
SHORTEST_SECONDS = 1200
"""Minimum length of a soak whose growth of memory and threads is judged: allocators take some four minutes to reach
their level, and thread pools start a thread when they first need one."""
LISTED = 20
"""Maximum number of bad outcomes and of kinds of log errors listed in the result."""
BAD = ("failed", "wrong", "timeout")
IDLE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = ("vllm:num_preemptions_total", "vllm:request_success_total", "vllm:generation_tokens_total")


@dataclass(frozen=True, kw_only=True)
class SoakSpec:
    """Server to soak, and the load."""

    model: Path
    """Checkpoint folder."""
    config: dict[str, Any]
    """`adapmoe_config`."""
    text: Path | None = None
    """Folder of `*.txt` for prompts; None: the bundled model's held-out text."""
    seconds: float
    """Duration of the plugin's soak."""
    stock_seconds: float
    """Duration of stock vLLM's soak; 0: none, and replays fail only with large gaps."""
    clients: int
    """Concurrent clients."""
    replayed: int
    """Maximum number of greedy requests that are repeated alone."""
    timeout: float
    """Time limit per request, seconds."""
    seed: int
    """Random seed for the clients' behaviour."""
    serve_args: list[str]
    """Further arguments for `vllm serve`."""


def run_soak(spec: SoakSpec) -> dict[str, Any]:
    """Soaks stock vLLM first, as the reference for how often replays differ, then the plugin.

    Raises:
        AdapMoEError: a server does not start, or dies.
    """
    check_packages()
    AdapMoEConfig.parse(spec.config)
    traffic = Traffic(str(spec.model), domains(spec.model, spec.text), MAX_MODEL_LEN, spec.seed)
    flags = [
        "--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(KV_CACHE_BYTES),
        "--num-gpu-blocks-override", str(BLOCKS_PER_CLIENT * spec.clients), *spec.serve_args,
    ]  # fmt: skip
    servers: dict[str, dict[str, Any]] = {}
    for name, config, seconds in (("stock", None, spec.stock_seconds), ("ours", spec.config, spec.seconds)):
        if seconds:
            with TemporaryDirectory() as folder, Server(name, spec.model, Path(folder), config, flags) as server:
                servers[name] = _soak(server, traffic, spec, seconds)
    return {
        "benchmark": "soak",
        "model": str(spec.model),
        "adapmoe_config": spec.config,
        "flags": flags,
        "plan": {key: getattr(spec, key) for key in ("seconds", "clients", "replayed", "timeout", "seed")},
        "mix": WEIGHTS,
        "servers": servers,
        "verdict": verdict(servers["ours"], servers.get("stock")),
    }


def _soak(server: Server, traffic: Traffic, spec: SoakSpec, seconds: float) -> dict[str, Any]:
    """Runs warm-up traffic, a pause, traffic, a pause, then replays."""
    question = {"prompt": next(iter(traffic.texts.values()))[:64], "max_tokens": 32, "return_token_ids": True}
    first = server.complete(**question, cache_salt="first")["choices"][0]["token_ids"]
    clients = Clients(server.url, traffic, spec.clients, spec.timeout, lambda: server.process.poll() is None)
    idle: list[Sample] = []
    with Watch(server, max(0.5, seconds / 240)) as watch:
        for part in (EARLY[0], 1 - EARLY[0]):
            asyncio.run(_with_progress(clients, part * seconds, server.name))
            if server.process.poll() is not None:
                error = first_error(server.log.read_text(errors="replace"))
                raise AdapMoEError(f"server {server.name} died after {len(clients.ended.outcomes)} requests: {error}")
            watch.loaded = False
            time.sleep(REST_SECONDS)
            idle.append(sample(server, watch.started))
            watch.loaded = True
    after = server.metrics()
    last = server.complete(**question, cache_salt="last")["choices"][0]["token_ids"]
    outcomes = clients.ended.outcomes
    return {
        "seconds": seconds,
        "requests": len(outcomes),
        "outcomes": tally(outcomes),
        "bad": [asdict(outcome) for outcome in outcomes if outcome.ended in BAD][:LISTED],
        "longest_seconds": max(outcome.seconds for outcome in outcomes),
        "growth": growth(watch.samples, idle),
        "samples": [asdict(reading) for reading in watch.samples],
        "idle_metrics": {name: after[f"vllm:{name}"] for name in IDLE},
        "counters": {
            name: value for name, value in after.items() if name.startswith("vllm:adapmoe_") or name in COUNTERS
        },
        "same_answer_first_and_last": first == last,
        "replay": replay(server, traffic, clients.ended.tokens, spec.replayed),
        "log_errors": log_errors(server.log.read_text(errors="replace").splitlines()),
    }


async def _with_progress(clients: Clients, seconds: float, name: str) -> None:
    async def show() -> None:
        with tqdm(desc=f"Soaking, {name}", unit="request") as bar:
            while True:
                await asyncio.sleep(0.5)
                bar.update(len(clients.ended.outcomes) - start - bar.n)

    start = len(clients.ended.outcomes)
    bar = asyncio.create_task(show())
    await clients.run(seconds)
    bar.cancel()


def tally(outcomes: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    """Counts the outcomes of each kind of request."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.kind, Counter())[outcome.ended] += 1
    return {kind: dict(counts[kind]) for kind in WEIGHTS if kind in counts}


def log_errors(lines: Iterable[str]) -> dict[str, int]:
    """Counts the error lines of a server's log, with numbers and addresses masked."""
    marked = (re.search(r"ERROR [\d-]+ [\d:]+ (.*)", line) for line in lines)
    messages = Counter(re.sub(r"0x[0-9a-f]+|[0-9a-f]{8,}|\d+", "#", match[1])[:200] for match in marked if match)
    return dict(messages.most_common(LISTED))


def verdict(ours: dict[str, Any], stock: dict[str, Any] | None) -> dict[str, bool | None]:
    """Returns for each requirement whether it was met; None: the soak was too short to tell."""
    replayed = ours["replay"]
    limit = WRONG_GAP if stock is None else max(WRONG_GAP, stock["replay"]["largest_gap_nats"])
    memory = ours["growth"]
    return {
        "every request was answered, refused or hung up on": not any(
            ended in BAD for ends in ours["outcomes"].values() for ended in ends
        ),
        "replays differ no more often than stock vLLM's": stock is None
        or chance_of_as_many(replayed, stock["replay"]) > CHANCE,
        f"where replays differ, by less than {limit:.2f} nats": replayed["largest_gap_nats"] <= limit,
        "the first question has the same answer at the end": ours["same_answer_first_and_last"],
        "idle at the end: nothing runs, waits or holds KV cache": not any(ours["idle_metrics"].values()),
        "memory does not grow": None
        if ours["seconds"] < SHORTEST_SECONDS
        else memory["anonymous"]["within"] and memory["proportional"]["within"],
        "threads do not grow": None if ours["seconds"] < SHORTEST_SECONDS else memory["threads"]["within"],
        "open files do not grow": memory["files"]["within"],
        "processes do not grow": memory["processes"]["within"],
    }


def print_soak(result: dict[str, Any], console: Console) -> None:
    """Prints the outcomes of requests, the resources held by the servers, and the verdict."""
    for name, server in result["servers"].items():
        ends = sorted({ended for kind in server["outcomes"].values() for ended in kind})
        table = Table(
            title=f"{name}: {server['requests']} requests in {server['seconds'] / 60:.1f} min, "
            f"{result['plan']['clients']} at once",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for column in ("", *ends):
            table.add_column(column, justify="right" if column else "left")
        for kind, counts in server["outcomes"].items():
            table.add_row(kind, *(str(counts.get(ended, "")) for ended in ends))
        console.print(table)
        _print_server(server, console)
    for requirement, met in result["verdict"].items():
        answer = "?  " if met is None else "yes" if met else "NO "
        console.print(f"{answer} {requirement}", style="bold red" if met is False else "", highlight=False)


def _print_server(server: dict[str, Any], console: Console) -> None:
    grown, replayed = server["growth"], server["replay"]
    for key, label in (("anonymous", "anonymous memory"), ("proportional", "memory (PSS)")):
        part = grown[key]
        console.print(
            f"{label}: {part['early_bytes'] / MiB:.1f} MiB early, {part['late_bytes'] / MiB:.1f} late, "
            f"{part['growth_bytes'] / MiB:+.1f} (limit {part['limit_bytes'] / MiB:.1f}), "
            f"{part['bytes_per_minute'] / MiB:+.2f} a minute",
            highlight=False,
        )
    processes = grown["anonymous"]["growth_bytes_of"].items()
    console.print("of it: " + ", ".join(f"{name} {size / MiB:+.1f}" for name, size in processes), highlight=False)
    console.print(
        "idle, after the warm-up and at the end: "
        + ", ".join(
            f"{key} {grown[key]['before']}, {grown[key]['after']}" for key in ("threads", "files", "processes")
        ),
        highlight=False,
    )
    console.print(
        f"replayed alone: {replayed['equal']} of {replayed['replayed']} equal; where they differ, gaps of "
        f"{replayed['median_gap_nats']:.3f} nats, at most {replayed['largest_gap_nats']:.3f}; longest request "
        f"{server['longest_seconds']:.1f} s",
        highlight=False,
    )
    for bad in server["bad"]:
        console.print(f"{bad['kind']} {bad['ended']}: {bad['detail']}", markup=False, highlight=False)
    for line, count in server["log_errors"].items():
        console.print(f"server log, {count} times: {line}", markup=False, highlight=False)
