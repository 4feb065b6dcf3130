"""Compares the plugin with the alternatives llama.cpp, transformers and stock vLLM under the same memory limit."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks import memory_cgroup
from benchmarks.peer_floor import belady_decode_bytes, pack_shape, sequential_bandwidth
from benchmarks.peer_packages import missing
from benchmarks.peer_process import OUT_OF_MEMORY, run_worker
from benchmarks.peer_worker import CONTENDERS, OFFLOADED, PACK, Task
from benchmarks.workload import prompts_of, ratios
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import read_model_config
from vllm_adapmoe.results import package_version, rotated, spread

OURS = ("adapmoe-lru", "adapmoe", "adapmoe-profile", "adapmoe-gated")
PROFILED = OURS[2:]
NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": ("accelerate",)}
REFERENCES = ("vllm", "transformers", "llama.cpp")
"""Contenders whose most probable tokens are the reference: the first of these that ran."""
ATTEMPTS = 3
"""Number of attempts to fit a contender in memory; each after an out-of-memory kill has a tenth less cache."""
MARGIN = 32
"""Divisor of the memory limit that gives the part left free when caches are sized."""


@dataclass(frozen=True, kw_only=True)
class PeersSpec:
    """Contenders to compare, the requests to measure them on, and what each may use."""

    model: Path
    """Checkpoint folder."""
    text: Path | None
    """Folder of `*.txt` for prompts; None: random tokens."""
    rounds: int
    """Measurements of every contender; each round has its own text."""
    prompt_tokens: int
    """Prompt tokens per request."""
    output_tokens: int
    """Output tokens per request, forced one by one."""
    memory: int | None
    """Bytes that a contender's processes may use, page cache included; None: no limit."""
    slots: int | None
    """Expert slots of the plugin; None: as many as fit."""
    files: Path | None
    """Folder that keeps files made from the checkpoint for later runs; None: a temporary folder."""
    timeout: float
    """Time limit per contender and run, seconds."""
    contenders: list[str]
    """Names of the contenders; the plugin always takes part."""
    enforce_eager: bool
    """Whether vLLM and the plugin run without compilation."""
    profile: Path | None
    """Profile of the model: adds the plugin with its next-token heads, and with gating by batch at a loss increase of
    half a percent."""

    def names(self) -> list[str]:
        """Returns the names of the contenders in order.

        Raises:
            AdapMoEError: unknown contender, or one that needs a profile.
        """
        if unknown := set(self.contenders) - set(CONTENDERS):
            raise AdapMoEError(f"--contenders {unknown.pop()!r} is not known; choose from {', '.join(CONTENDERS)}")
        if self.profile is None and (unable := set(self.contenders) & set(PROFILED)):
            raise AdapMoEError(f"--contenders {unable.pop()!r} needs a profile; give --profile")
        profiled = () if self.profile is None else PROFILED
        return [name for name in CONTENDERS if name in self.contenders or name == "adapmoe" or name in profiled]


@dataclass
class PeerRuns:
    """Runs of the contenders, with their settings and results."""

    spec: PeersSpec
    files: Path
    """Folder of files made from the checkpoint."""
    sequences: list[list[int]]
    names: list[str]
    """Names of the contenders, in order."""
    progress: tqdm
    settings: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in CONTENDERS})
    """Fields of `Spec` for each contender."""
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in CONTENDERS})

    @property
    def pack(self) -> Path:
        return self.files / PACK / "experts-0-of-1.pack"

    def task(self, name: str, sequences: list[list[int]]) -> Task:
        """Returns the task of running these sequences on a contender."""
        folders = str(self.spec.model), str(self.files)
        task = Task(name, *folders, sequences, self.spec.prompt_tokens, **self.settings[name])
        return replace(task, enforce_eager=self.spec.enforce_eager)

    def run(self, task: Task, what: str) -> dict[str, Any]:
        """Runs a contender; one that fails is not measured again."""
        self.progress.set_description(f"{what} {task.contender}")
        result = run_worker(task, None if task.prepare else self.spec.memory, self.spec.timeout)
        self.progress.update()
        if "failure" in result:
            self.failures[task.contender] = result
        return result

    def prepare(self) -> None:
        """Makes the GGUF file and the pack, without a memory limit."""
        for name in self.names:
            if (reason := missing(*NEEDS.get(name, ()))) is not None:
                self.failures[name] = {"failure": reason}
        for name in ("llama.cpp", "adapmoe"):
            if name in self.names and name not in self.failures:
                self.run(replace(self.task(name, self.sequences[:1]), prepare=True), "Preparing")
        if "adapmoe" in self.failures:
            raise AdapMoEError(f"{self.spec.model} cannot be packed: {self.failures['adapmoe']['failure']}")

    def fit_transformers(self, spare: int) -> None:
        """Gives transformers the memory beyond its own needs for weights, or `spare` bytes without a limit."""
        name = "transformers"
        if name in self.failures or name not in self.names:
            return
        shortest = self._shortest()
        if self.spec.memory is not None:
            smallest = self.run(self.task(name, shortest), "Measuring the memory needs of")
            if name in self.failures:
                return
            spare = max(0, self.spec.memory - self.spec.memory // MARGIN - smallest["held_bytes"])
        self.settings[name]["cache_bytes"] = spare
        self._settle(name, "cache_bytes", shortest)

    def _shortest(self) -> list[list[int]]:
        """Returns one sequence of two decoded tokens, enough to see how much memory a contender needs."""
        return [self.sequences[0][: self.spec.prompt_tokens + 2]]

    def fit_slots(self, experts: int, expert_bytes: int) -> None:
        """Gives the plugin the slots that fit beyond its own needs, or half of the experts without a limit."""
        name, slots, memory = "adapmoe", self.spec.slots, self.spec.memory
        if slots is None and memory is not None:
            config = read_model_config(self.spec.model)
            fewest = max(8, 2 * config.get("num_experts_per_tok", 1))
            self.settings[name]["slots"] = min(fewest, experts - 1)
            smallest = self.run(self.task(name, self._shortest()), "Measuring the memory needs of")
            if "failure" in smallest:
                self.failures |= dict.fromkeys(OURS, smallest)
                return
            spare = memory - memory // MARGIN - smallest["held_bytes"]
            slots = min(experts - 1, self.settings[name]["slots"] + max(0, spare // expert_bytes))
        self.settings[name]["slots"] = experts // 2 if slots is None else slots
        self.settings[name]["trace"] = str(self.files / "routing.trace")
        self._settle(name, "slots", self.sequences)
        del self.settings[name]["trace"]
        for other in OURS:
            self.settings[other] = self.settings[other] | self.settings[name]

    def _settle(self, name: str, key: str, sequences: list[list[int]]) -> None:
        """Runs a contender with a setting, and retries with less of it while it runs out of memory."""
        for attempt in range(ATTEMPTS):
            self.failures.pop(name, None)
            if attempt:
                self.settings[name][key] = self.settings[name][key] * 9 // 10
            if self.run(self.task(name, sequences), "Fitting").get("failure") != OUT_OF_MEMORY:
                return

    def measure(self, number: int) -> None:
        """Measures one round: every contender that has not failed, once; the order rotates by round."""
        for name in rotated(self.names, number):
            if name not in self.failures:
                result = self.run(self.task(name, [self.sequences[number]]), f"Round {number + 1}:")
                if "failure" not in result:
                    self.rounds[name].append(result | result.pop("answers")[0])


def run_peers(spec: PeersSpec) -> dict[str, Any]:
    """Runs the same tokens on every contender, each in its own process from a cold page cache, one at a time.

    Raises:
        AdapMoEError: unknown contender, memory cannot be limited here, or the experts cannot be packed.
    """
    if spec.memory is not None and (reason := memory_cgroup.why_not()) is not None:
        raise AdapMoEError(f"--memory cannot be limited here ({reason}); run as root, or omit --memory")
    names = spec.names()
    sequences = prompts_of(spec.model, spec.text, spec.rounds, spec.prompt_tokens + spec.output_tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) if spec.files is None else spec.files
        folder.mkdir(parents=True, exist_ok=True)
        progress = stack.enter_context(tqdm(total=6 + spec.rounds * len(names), unit="run"))
        runs = PeerRuns(spec, folder, sequences, names, progress)
        for name in PROFILED:
            runs.settings[name]["profile"] = None if spec.profile is None else str(spec.profile)
        runs.prepare()
        experts, expert_bytes = pack_shape(runs.pack)
        runs.fit_slots(experts, expert_bytes)
        runs.fit_transformers(runs.settings["adapmoe"]["slots"] * expert_bytes)
        bandwidth = []
        for number in range(spec.rounds):
            bandwidth.append(sequential_bandwidth(runs.pack, expert_bytes))
            runs.measure(number)
        shutil.rmtree(folder / OFFLOADED, ignore_errors=True)
        trace = folder / "routing.trace"
        slots = runs.settings["adapmoe"]["slots"]
        moved = None if "adapmoe" in runs.failures else belady_decode_bytes(trace, slots)
    return {
        "benchmark": "peers",
        "model": str(spec.model),
        "memory_bytes": spec.memory,
        "experts": experts,
        "expert_bytes": expert_bytes,
        "prompt_tokens": spec.prompt_tokens,
        "output_tokens": spec.output_tokens,
        "enforce_eager": spec.enforce_eager,
        "versions": {name: package_version(name) for name in ("llama-cpp-python", "gguf", "accelerate")},
        "contenders": _points(runs),
        "floor": None if moved is None else _floor(runs, moved, bandwidth),
    }


def _points(runs: PeerRuns) -> dict[str, dict[str, Any]]:
    """Returns the figures of every contender."""
    ran = {name: runs.rounds[name] for name in runs.names if name not in runs.failures}
    speeds = {name: [1 / _token_seconds(result) for result in rounds] for name, rounds in ran.items()}
    best = max((name for name in ran if name not in OURS), key=lambda name: median(speeds[name]), default=None)
    reference = next((name for name in REFERENCES if name in ran), None)
    points = {}
    for name in runs.names:
        if name in runs.failures:
            points[name] = {"settings": runs.settings[name]} | runs.failures[name]
            continue
        rounds = ran[name]
        timed = [{"speed": speed} for speed in speeds[name]]
        points[name] = {
            "settings": runs.settings[name],
            "decode_tokens_per_second": spread(speeds[name]),
            "decode_ms_per_token": spread([1e3 * _token_seconds(result) for result in rounds]),
            "prefill_seconds": spread([result["prefill_seconds"] for result in rounds]),
            "load_seconds": spread([result["load_seconds"] for result in rounds]),
            "read_bytes_per_token": spread(
                [result["decode_read_bytes"] / len(result["step_seconds"]) for result in rounds]
            ),
            "peak_bytes": None if runs.spec.memory is None else max(result["peak_bytes"] for result in rounds),
            "held_bytes": max(result["held_bytes"] for result in rounds),
            "agreement": None if reference is None else _agreement(rounds, ran[reference]),
            "agreement_with": reference,
            "ratio_to_best_peer": None
            if best is None
            else ratios(timed, [{"speed": speed} for speed in speeds[best]], "speed"),
            "best_peer": best,
            "load_average": spread([result["load_average"] for result in rounds]),
            "cache": [result["cache"] for result in rounds],
            "step_seconds": [result["step_seconds"] for result in rounds],
        }
    return points


def _token_seconds(result: dict[str, Any]) -> float:
    return result["decode_seconds"] / len(result["step_seconds"])


def _agreement(rounds: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Returns the share of positions with the same most probable token."""
    pairs = [
        pair
        for result, expected in zip(rounds, reference, strict=True)
        for pair in zip(result["best"], expected["best"], strict=True)
    ]
    return sum(token == expected for token, expected in pairs) / len(pairs)


def _floor(runs: PeerRuns, moved: list[float], bandwidth: list[float]) -> dict[str, Any]:
    """Returns the minimum seconds per token, moving and then computing, and each contender's time relative to it.

    Prefetch can overlap both: `overlapped_ms_per_token` is the longer of the two. Computing is the decode time of the
    plugin on demand with LRU, minus its stalls: it makes no predictions and reads nothing in the background.
    """
    compute = [
        (result["decode_seconds"] - result["cache"]["stall_seconds"]) / len(result["step_seconds"])
        for result in runs.rounds["adapmoe-lru"]
    ]
    if not compute or "adapmoe-lru" in runs.failures:
        return {"belady_bytes_per_token": spread(moved), "sequential_bytes_per_second": spread(bandwidth)}
    moving = [nbytes / speed for nbytes, speed in zip(moved, bandwidth, strict=True)]
    floors = [sum(parts) for parts in zip(moving, compute, strict=True)]
    return {
        "belady_bytes_per_token": spread(moved),
        "sequential_bytes_per_second": spread(bandwidth),
        "compute_ms_per_token": spread([1e3 * seconds for seconds in compute]),
        "ms_per_token": spread([1e3 * seconds for seconds in floors]),
        "overlapped_ms_per_token": spread([1e3 * max(parts) for parts in zip(moving, compute, strict=True)]),
        "times_floor": {
            name: spread([_token_seconds(result) / floor for result, floor in zip(rounds, floors, strict=True)])
            for name, rounds in runs.rounds.items()
            if rounds and name not in runs.failures
        },
    }
