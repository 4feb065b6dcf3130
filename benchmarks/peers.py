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
from benchmarks.peer_worker import CONTENDERS, OFFLOADED, PACK, Spec
from benchmarks.workload import prompts_of, ratios
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import read_model_config
from vllm_adapmoe.results import package_version, spread

OURS = ("adapmoe-lru", "adapmoe", "adapmoe-profile", "adapmoe-gated")
PROFILED = OURS[2:]
NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": ("accelerate",)}
REFERENCES = ("vllm", "transformers", "llama.cpp")
"""Contenders whose most probable tokens are the reference: the first of these that ran."""
ATTEMPTS = 3
"""Number of attempts to fit a contender in memory; each after an out-of-memory kill has a tenth less cache."""
MARGIN = 32
"""Divisor of the memory limit that gives the part left free when caches are sized."""


@dataclass
class Field:
    """Contenders of one run with their settings and results."""

    model: Path
    files: Path
    sequences: list[list[int]]
    prompt_tokens: int
    memory: int | None
    timeout: float
    enforce_eager: bool
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

    def spec(self, name: str, sequences: list[list[int]]) -> Spec:
        spec = Spec(name, str(self.model), str(self.files), sequences, self.prompt_tokens, **self.settings[name])
        return replace(spec, enforce_eager=self.enforce_eager)

    def run(self, spec: Spec, what: str) -> dict[str, Any]:
        """Runs a contender; one that fails is not measured any more."""
        self.progress.set_description(f"{what} {spec.contender}")
        result = run_worker(spec, None if spec.prepare else self.memory, self.timeout)
        self.progress.update()
        if "failure" in result:
            self.failures[spec.contender] = result
        return result

    def prepare(self) -> None:
        """Makes the GGUF file and the pack, without a memory limit."""
        for name in self.names:
            if (reason := missing(*NEEDS.get(name, ()))) is not None:
                self.failures[name] = {"failure": reason}
        for name in ("llama.cpp", "adapmoe"):
            if name in self.names and name not in self.failures:
                self.run(replace(self.spec(name, self.sequences[:1]), prepare=True), "Preparing")
        if "adapmoe" in self.failures:
            raise AdapMoEError(f"{self.model} cannot be packed: {self.failures['adapmoe']['failure']}")

    def fit_transformers(self, spare: int) -> None:
        """Gives transformers the memory beyond its own needs for weights, or `spare` bytes without a limit."""
        name = "transformers"
        if name in self.failures or name not in self.names:
            return
        few = [self.sequences[0][: self.prompt_tokens + 2]]
        if self.memory is not None:
            least = self.run(self.spec(name, few), "Trying the least of")
            if name in self.failures:
                return
            spare = max(0, self.memory - self.memory // MARGIN - least["held_bytes"])
        self.settings[name]["cache_bytes"] = spare
        self._settle(name, "cache_bytes", few)

    def fit_slots(self, slots: int | None, experts: int, expert_bytes: int) -> None:
        """Gives the plugin the slots that fit beyond its own needs, or half of the experts without a limit."""
        name = "adapmoe"
        if slots is None and self.memory is not None:
            config = read_model_config(self.model)
            fewest = max(8, 2 * config.get("num_experts_per_tok", 1))
            self.settings[name]["slots"] = min(fewest, experts - 1)
            least = self.run(self.spec(name, [self.sequences[0][: self.prompt_tokens + 2]]), "Trying the least of")
            if "failure" in least:
                self.failures |= dict.fromkeys(OURS, least)
                return
            spare = self.memory - self.memory // MARGIN - least["held_bytes"]
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
            if self.run(self.spec(name, sequences), "Fitting").get("failure") != OUT_OF_MEMORY:
                return

    def measure(self, number: int) -> None:
        """Measures one round: every contender that has not failed, once; the order rotates by round."""
        first = number % len(self.names)
        for name in self.names[first:] + self.names[:first]:
            if name not in self.failures:
                result = self.run(self.spec(name, [self.sequences[number]]), f"Round {number + 1}:")
                if "failure" not in result:
                    self.rounds[name].append(result | result.pop("answers")[0])


def run_peers(
    model: Path,
    text: Path | None,
    rounds: int,
    prompt_tokens: int,
    output_tokens: int,
    memory: int | None,
    slots: int | None,
    files: Path | None,
    timeout: float,
    names: list[str],
    enforce_eager: bool,
    profile: Path | None,
) -> dict[str, Any]:
    """Runs the same tokens on every contender, each in its own process from a cold page cache, one at a time.

    Args:
        model: checkpoint folder.
        text: folder of `*.txt` for prompts.
        rounds: measurements of every contender; each round has its own text.
        prompt_tokens: prompt tokens per request.
        output_tokens: output tokens per request, forced one by one.
        memory: bytes that a contender's processes may use, page cache included; None: no limit.
        slots: expert slots of the plugin; None: as many as fit.
        files: folder that keeps files made from the checkpoint for later runs; None: a temporary folder.
        timeout: time limit per contender and run, seconds.
        names: names of the contenders; the plugin always takes part.
        enforce_eager: vLLM and the plugin run without compilation.
        profile: profile of the model: adds the plugin with its next-token heads, and with gating by batch at a loss
            increase of half a percent.

    Raises:
        AdapMoEError: unknown contender, memory cannot be limited here, or the experts cannot be packed.
    """
    if memory is not None and (reason := memory_cgroup.why_not()) is not None:
        raise AdapMoEError(f"--memory cannot be limited here ({reason}); run as root, or leave --memory out")
    if unknown := set(names) - set(CONTENDERS):
        raise AdapMoEError(f"--contenders {unknown.pop()!r} is not known; choose from {', '.join(CONTENDERS)}")
    if profile is None and (unable := set(names) & set(PROFILED)):
        raise AdapMoEError(f"--contenders {unable.pop()!r} needs a profile; give --profile")
    names = [
        name for name in CONTENDERS if name in names or name == "adapmoe" or (name in PROFILED and profile is not None)
    ]
    sequences = prompts_of(model, text, rounds, prompt_tokens + output_tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) if files is None else files
        folder.mkdir(parents=True, exist_ok=True)
        progress = stack.enter_context(tqdm(total=6 + rounds * len(names), unit="run"))
        contenders = Field(model, folder, sequences, prompt_tokens, memory, timeout, enforce_eager, names, progress)
        for name in PROFILED:
            contenders.settings[name]["profile"] = None if profile is None else str(profile)
        contenders.prepare()
        experts, expert_bytes = pack_shape(contenders.pack)
        contenders.fit_slots(slots, experts, expert_bytes)
        contenders.fit_transformers(contenders.settings["adapmoe"]["slots"] * expert_bytes)
        bandwidth = []
        for number in range(rounds):
            bandwidth.append(sequential_bandwidth(contenders.pack, expert_bytes))
            contenders.measure(number)
        shutil.rmtree(folder / OFFLOADED, ignore_errors=True)
        trace = folder / "routing.trace"
        moved = (
            belady_decode_bytes(trace, contenders.settings["adapmoe"]["slots"])
            if "adapmoe" not in contenders.failures
            else None
        )
    return {
        "benchmark": "peers",
        "model": str(model),
        "memory_bytes": memory,
        "experts": experts,
        "expert_bytes": expert_bytes,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "enforce_eager": enforce_eager,
        "versions": {name: package_version(name) for name in ("llama-cpp-python", "gguf", "accelerate")},
        "contenders": _points(contenders),
        "floor": None if moved is None else _floor(contenders, moved, bandwidth),
    }


def _points(contenders: Field) -> dict[str, dict[str, Any]]:
    """Returns the figures of every contender."""
    ran = {name: contenders.rounds[name] for name in contenders.names if name not in contenders.failures}
    speeds = {name: [1 / _token_seconds(one) for one in rounds] for name, rounds in ran.items()}
    best = max((name for name in ran if name not in OURS), key=lambda name: median(speeds[name]), default=None)
    reference = next((name for name in REFERENCES if name in ran), None)
    points = {}
    for name in contenders.names:
        if name in contenders.failures:
            points[name] = {"settings": contenders.settings[name]} | contenders.failures[name]
            continue
        rounds = ran[name]
        timed = [{"speed": speed} for speed in speeds[name]]
        points[name] = {
            "settings": contenders.settings[name],
            "decode_tokens_per_second": spread(speeds[name]),
            "decode_ms_per_token": spread([1e3 * _token_seconds(one) for one in rounds]),
            "prefill_seconds": spread([one["prefill_seconds"] for one in rounds]),
            "load_seconds": spread([one["load_seconds"] for one in rounds]),
            "read_bytes_per_token": spread([one["decode_read_bytes"] / len(one["step_seconds"]) for one in rounds]),
            "peak_bytes": None if contenders.memory is None else max(one["peak_bytes"] for one in rounds),
            "held_bytes": max(one["held_bytes"] for one in rounds),
            "agreement": None if reference is None else _agreement(rounds, ran[reference]),
            "agreement_with": reference,
            "ratio_to_best_peer": None
            if best is None
            else ratios(timed, [{"speed": speed} for speed in speeds[best]], "speed"),
            "best_peer": best,
            "load_average": spread([one["load_average"] for one in rounds]),
            "cache": [one["cache"] for one in rounds],
            "step_seconds": [one["step_seconds"] for one in rounds],
        }
    return points


def _token_seconds(one: dict[str, Any]) -> float:
    return one["decode_seconds"] / len(one["step_seconds"])


def _agreement(rounds: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Returns the share of positions with the same most probable token."""
    pairs = [
        pair
        for one, other in zip(rounds, reference, strict=True)
        for pair in zip(one["best"], other["best"], strict=True)
    ]
    return sum(mine == other for mine, other in pairs) / len(pairs)


def _floor(contenders: Field, moved: list[float], bandwidth: list[float]) -> dict[str, Any]:
    """Returns the minimum seconds per token, moving and then computing, and each contender's time relative to it.

    Prefetch can overlap both: `overlapped_ms_per_token` is the longer of the two. Computing is the decode time of the
    plugin on demand with LRU, minus its stalls: it makes no predictions and reads nothing in the background.
    """
    compute = [
        (one["decode_seconds"] - one["cache"]["stall_seconds"]) / len(one["step_seconds"])
        for one in contenders.rounds["adapmoe-lru"]
    ]
    if not compute or "adapmoe-lru" in contenders.failures:
        return {"belady_bytes_per_token": spread(moved), "sequential_bytes_per_second": spread(bandwidth)}
    moving = [nbytes / speed for nbytes, speed in zip(moved, bandwidth, strict=True)]
    least = [sum(parts) for parts in zip(moving, compute, strict=True)]
    return {
        "belady_bytes_per_token": spread(moved),
        "sequential_bytes_per_second": spread(bandwidth),
        "compute_ms_per_token": spread([1e3 * seconds for seconds in compute]),
        "ms_per_token": spread([1e3 * seconds for seconds in least]),
        "overlapped_ms_per_token": spread([1e3 * max(parts) for parts in zip(moving, compute, strict=True)]),
        "times_floor": {
            name: spread([_token_seconds(one) / floor for one, floor in zip(rounds, least, strict=True)])
            for name, rounds in contenders.rounds.items()
            if rounds and name not in contenders.failures
        },
    }
