"""Compares the plugin with the alternatives llama.cpp, transformers and stock vLLM under the same memory limits."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks import memory_cgroup
from benchmarks.peer_figures import figures, floor, loss_figures, ran, rivals
from benchmarks.peer_floor import belady_decode_bytes, pack_shape, sequential_bandwidth
from benchmarks.peer_packages import missing
from benchmarks.peer_process import OUT_OF_MEMORY, run_worker
from benchmarks.peer_worker import CONTENDERS, FORMATS, OFFLOADED, PRECISIONS, Task, pack_file
from benchmarks.workload import prompts_of
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import read_model_config
from vllm_adapmoe.results import package_version, rotated
from vllm_adapmoe.units import GiB

PROFILED = ("adapmoe-profile", "adapmoe-gated")
"""Contenders that need a profile."""
WITH_PROFILE = (*PROFILED, "adapmoe-8", "adapmoe-4")
"""Contenders that use the profile if there is one."""
ON_DEMAND = "adapmoe-lru"
"""Contender that makes no predictions."""
NEEDS = dict.fromkeys(FORMATS, ("llama_cpp", "gguf")) | {"transformers": ("accelerate",)}
ATTEMPTS = 3
"""Number of attempts to fit a contender in memory; each after an out-of-memory kill has a tenth less cache."""
MARGIN = 32
"""Divisor of the memory limit that gives the part left free when caches are sized."""
LOSS_LENGTH = 128
"""Tokens of each sequence whose loss is measured."""


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
    loss_tokens: int
    """Tokens of the text whose loss is measured, once for each format of the weights; 0: none."""
    memory: list[int | None]
    """Limits on the bytes that a contender's processes may use, page cache included; None: no limit."""
    files: Path | None
    """Folder that keeps files made from the checkpoint for later runs; None: a temporary folder."""
    timeout: float
    """Time limit per contender and run, seconds."""
    contenders: list[str]
    """Names of the contenders."""
    enforce_eager: bool
    """Whether vLLM and the plugin run without compilation."""
    profile: Path | None
    """Profile of the model: adds the plugin with its next-token heads, and with gating by batch at a loss increase of
    half a percent; the plugin with fewer bits uses it, too."""

    def names(self) -> list[str]:
        """Returns the names of the contenders in order.

        Raises:
            AdapMoEError: unknown contender, one that needs a profile, or none of the plugin.
        """
        if unknown := set(self.contenders) - set(CONTENDERS):
            raise AdapMoEError(f"--contenders {unknown.pop()!r} is not known; choose from {', '.join(CONTENDERS)}")
        if self.profile is None and (unable := set(self.contenders) & set(PROFILED)):
            raise AdapMoEError(f"--contenders {unable.pop()!r} needs a profile; give --profile")
        if not set(self.contenders) & set(PRECISIONS):
            raise AdapMoEError(f"--contenders has none of the plugin; add one of {', '.join(PRECISIONS)}")
        profiled = () if self.profile is None else PROFILED
        return [name for name in CONTENDERS if name in self.contenders or name in profiled]


@dataclass
class Limit:
    """The contenders under one memory limit."""

    memory: int | None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fields of `Task` for each contender."""
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


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
    limits: list[Limit]
    file_bytes: dict[str, int] = field(default_factory=dict)
    """Size of each contender's file of weights; the plugin's holds the experts alone."""

    @property
    def ours(self) -> list[str]:
        """The plugin's contenders."""
        return [name for name in self.names if name in PRECISIONS]

    def first_of(self, precision: int) -> str:
        """Returns the first of the plugin's contenders with this precision."""
        return next(name for name in self.ours if PRECISIONS[name] == precision)

    @property
    def precisions(self) -> list[int]:
        return list(dict.fromkeys(PRECISIONS[name] for name in self.ours))

    def one_of_each_format(self) -> list[str]:
        """Returns a contender for each file of weights, without those that are left out."""
        names = [*FORMATS, *map(self.first_of, self.precisions)]
        return [name for name in names if name in self.names and not self.failed(name)]

    def task(self, name: str, sequences: list[list[int]], **fields: Any) -> Task:
        """Returns the task of running these sequences on a contender."""
        folders = str(self.spec.model), str(self.files)
        profile = None if self.spec.profile is None or name not in WITH_PROFILE else str(self.spec.profile)
        task = Task(name, *folders, sequences, self.spec.prompt_tokens, profile=profile)
        return replace(task, enforce_eager=self.spec.enforce_eager, **fields)

    def run(self, task: Task, memory: int | None, what: str) -> dict[str, Any]:
        """Runs a contender's process."""
        self.progress.set_description(f"{what} {task.contender}")
        result = run_worker(task, memory, self.spec.timeout)
        self.progress.update()
        return result

    def fail(self, name: str, result: dict[str, Any]) -> None:
        """Leaves a contender out, under every limit."""
        for limit in self.limits:
            limit.failures[name] = result

    def failed(self, name: str) -> bool:
        """Returns whether a contender is left out under every limit."""
        return all(name in limit.failures for limit in self.limits)

    def prepare(self) -> None:
        """Makes the GGUF files and the packs.

        Raises:
            AdapMoEError: the experts cannot be packed.
        """
        for name in self.names:
            if (reason := missing(*NEEDS.get(name, ()))) is not None:
                self.fail(name, {"failure": reason})
        for name in self.one_of_each_format():
            result = self.run(self.task(name, self.sequences[:1], prepare=True), None, "Preparing")
            if "failure" not in result:
                self.file_bytes[name] = result["file_bytes"]
            elif name in FORMATS:
                self.fail(name, result)
            else:
                raise AdapMoEError(f"{self.spec.model} cannot be packed: {result['failure']}")

    def measure_losses(self) -> dict[str, list[float]]:
        """Measures the loss of each format of the weights, without a memory limit; returns nats of each token."""
        if not self.spec.loss_tokens:
            return {}
        texts = prompts_of(self.spec.model, self.spec.text, -(-self.spec.loss_tokens // LOSS_LENGTH), LOSS_LENGTH)
        losses = {}
        for name in self.one_of_each_format():
            slots = {"slots": pack_shape(pack_file(self.files, name))[0] - 1} if name in PRECISIONS else {}
            task = self.task(name, texts, losses=True, **slots)
            result = self.run(replace(task, prompt_tokens=LOSS_LENGTH), None, "Measuring the loss of")
            if "failure" in result:
                raise AdapMoEError(f"the loss of {name} cannot be measured: {result['failure']}")
            losses[name] = result["losses"]
        return losses

    def fit_transformers(self) -> None:
        """Gives transformers the memory beyond its own needs for weights."""
        name = "transformers"
        if name not in self.names or self.failed(name):
            return
        smallest = self.run(self.task(name, self._shortest()), psutil.virtual_memory().total, "Measuring")
        if "failure" in smallest:
            self.fail(name, smallest)
            return
        for limit in self.limits:
            memory = limit.memory or psutil.virtual_memory().available
            limit.settings[name] = {"cache_bytes": max(0, memory - memory // MARGIN - smallest["held_bytes"])}

    def _shortest(self) -> list[list[int]]:
        """Returns one sequence of two decoded tokens, enough to see how much memory a contender needs."""
        return [self.sequences[0][: self.spec.prompt_tokens + 2]]

    def fit_slots(self) -> None:
        """Gives the plugin the slots that fit beyond its own needs, or half of the experts without a limit."""
        top_k = read_model_config(self.spec.model).get("num_experts_per_tok", 1)
        for precision in self.precisions:
            name = self.first_of(precision)
            experts, expert_bytes = pack_shape(pack_file(self.files, name))
            few = min(max(8, 2 * top_k), experts - 1)
            # Twice: compiling, which only the first start does, takes memory of its own.
            for _ in range(1 if self.spec.enforce_eager else 2):
                smallest = self.run(
                    self.task(name, self._shortest(), slots=few), psutil.virtual_memory().total, "Measuring"
                )
            for other in (other for other in self.ours if PRECISIONS[other] == precision):
                for limit in self.limits:
                    if "failure" in smallest:
                        limit.failures[other] = smallest
                        continue
                    slots = experts // 2
                    if limit.memory is not None:
                        spare = limit.memory - limit.memory // MARGIN - smallest["held_bytes"]
                        slots = min(experts - 1, few + spare // expert_bytes)
                    limit.settings[other] = {"slots": slots}
                    if slots < top_k:
                        limit.failures[other] = {"failure": "too little memory for the experts of one token"}

    def compile(self) -> None:
        """Starts each of the plugin's configurations once without a limit, so that none is compiled under one."""
        if self.spec.enforce_eager:
            return
        for limit in self.limits:
            for name in self.ours:
                if name not in limit.failures:
                    self.run(self.task(name, self._shortest(), **limit.settings[name]), None, "Compiling")

    def trace(self, experts: int) -> Path | None:
        """Records the routing of all sequences, which is the same under every limit; None without `adapmoe-lru`."""
        if ON_DEMAND not in self.names:
            return None
        path = self.files / "routing.trace"
        task = self.task(ON_DEMAND, self.sequences, slots=experts - 1, trace=str(path))
        if "failure" in (result := self.run(task, None, "Tracing")):
            raise AdapMoEError(f"the routing cannot be recorded: {result['failure']}")
        return path

    def floor(self, limit: Limit, trace: Path | None, bandwidth: list[float]) -> dict[str, Any] | None:
        """Returns the lower bound of the time per token under a limit; None if `adapmoe-lru` did not run."""
        if trace is None or ON_DEMAND not in ran(limit):
            return None
        return floor(limit, belady_decode_bytes(trace, limit.settings[ON_DEMAND]["slots"]), bandwidth)

    def measure(self, number: int) -> None:
        """Measures one round: every contender that has not failed, once under each limit; the order rotates."""
        for limit in rotated(self.limits, number):
            for name in rotated(self.names, number):
                if name not in limit.failures:
                    self._measure(limit, name, number)

    def _measure(self, limit: Limit, name: str, number: int) -> None:
        what = f"Round {number + 1}," + ("" if limit.memory is None else f" {limit.memory / GiB:.2f} GiB,")
        settings = limit.settings.setdefault(name, {})
        for attempt in range(ATTEMPTS):
            if attempt and settings and not limit.rounds.get(name):
                for key in settings:
                    settings[key] = settings[key] * 9 // 10
            result = self.run(self.task(name, [self.sequences[number]], **settings), limit.memory, what)
            if result.get("failure") != OUT_OF_MEMORY or not settings:
                break
        if "failure" in result:
            limit.failures[name] = result
        else:
            limit.rounds.setdefault(name, []).append(result | result.pop("answers")[0])


def run_peers(spec: PeersSpec) -> dict[str, Any]:
    """Runs the same tokens on every contender, each in its own process from a cold page cache, one at a time.

    Raises:
        AdapMoEError: unknown contender, memory cannot be limited here, or the experts cannot be packed.
    """
    if spec.memory != [None] and (reason := memory_cgroup.why_not()) is not None:
        raise AdapMoEError(f"--memory cannot be limited here ({reason}); run as root, or omit --memory")
    names = spec.names()
    sequences = prompts_of(spec.model, spec.text, spec.rounds, spec.prompt_tokens + spec.output_tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) if spec.files is None else spec.files
        folder.mkdir(parents=True, exist_ok=True)
        progress = stack.enter_context(tqdm(unit="run"))
        runs = PeerRuns(spec, folder, sequences, names, progress, [Limit(memory) for memory in spec.memory])
        runs.prepare()
        losses = runs.measure_losses()
        runs.fit_slots()
        runs.fit_transformers()
        runs.compile()
        pack = pack_file(folder, runs.first_of(runs.precisions[0]))
        experts, expert_bytes = pack_shape(pack)
        trace = runs.trace(experts)
        bandwidth = []
        progress.reset(spec.rounds * sum(name not in limit.failures for limit in runs.limits for name in names))
        for number in range(spec.rounds):
            bandwidth.append(sequential_bandwidth(pack, expert_bytes))
            runs.measure(number)
        shutil.rmtree(folder / OFFLOADED, ignore_errors=True)
        limits = [
            {
                "memory_bytes": limit.memory,
                "contenders": {name: figures(name, limit) for name in names},
                "rivals": rivals(limit, losses),
                "floor": runs.floor(limit, trace, bandwidth),
            }
            for limit in runs.limits
        ]
    return {
        "benchmark": "peers",
        "model": str(spec.model),
        "experts": experts,
        "expert_bytes": expert_bytes,
        "file_bytes": runs.file_bytes,
        "prompt_tokens": spec.prompt_tokens,
        "output_tokens": spec.output_tokens,
        "enforce_eager": spec.enforce_eager,
        "versions": {name: package_version(name) for name in ("llama-cpp-python", "gguf", "accelerate")},
        "loss_tokens": len(next(iter(losses.values()), [])),
        "losses": loss_figures(losses),
        "limits": limits,
    }
