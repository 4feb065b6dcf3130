"""Runs one contender of `python -m benchmarks peers` in its own process: decodes given tokens, prints a line of JSON.

python -m benchmarks.peer_worker TASK, where TASK is a JSON object with the fields of `Task`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from benchmarks.peer_packages import need
from benchmarks.residency import ON_DEMAND
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import read_model_config

FORMATS = {"llama.cpp": None, "llama.cpp-q8_0": "Q8_0", "llama.cpp-q4_k_m": "Q4_K_M", "llama.cpp-q4_0": "Q4_0"}
"""Format that llama.cpp's own quantiser makes for each of its contenders; None: as exported, in bfloat16."""
PRECISIONS = {
    "adapmoe-lru": 16,
    "adapmoe": 16,
    "adapmoe-profile": 16,
    "adapmoe-gated": 16,
    "adapmoe-8": 8,
    "adapmoe-4": 4,
}
"""`precision` of each of the plugin's contenders."""
PACK, OFFLOADED = "pack", "offloaded"
GATED = {"gating": {"mode": "batch", "max_loss_increase": 0.005}}
KV_BLOCK = 128
"""Tokens per block of vLLM's KV cache on the CPU."""


@dataclass(frozen=True)
class Task:
    """Task of a contender."""

    contender: str
    model: str
    """Checkpoint folder."""
    files: str
    """Folder for files made from the checkpoint."""
    sequences: list[list[int]]
    """Token ids of the sequences, run one after another, each in an empty context."""
    prompt_tokens: int
    """Prompt tokens of each sequence; the rest is decoded."""
    cache_bytes: int = 0
    """Bytes of weights that transformers may keep in memory."""
    slots: int = 0
    """Expert slots of the plugin."""
    enforce_eager: bool = False
    """Whether vLLM runs without compilation and CUDA graphs, as in `vllm serve`."""
    trace: str | None = None
    """File for the plugin's routing trace."""
    profile: str | None = None
    """Profile of the model, for the plugin."""
    prepare: bool = False
    """Whether to only make the files that the contender needs."""
    losses: bool = False
    """Whether to measure the loss of the sequences, each as one prompt, in place of decoding them."""

    @property
    def length(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(map(len, self.sequences))


class Contender(Protocol):
    """A loaded model."""

    def best_tokens(self, ids: list[int], prompt_tokens: int) -> Iterator[int]:
        """Yields the most probable next token after the prompt, then after each further id, one step each.

        The last id is not decoded, since no token after it is needed.
        """
        ...

    def losses(self, sequences: list[list[int]]) -> list[float]:
        """Returns the loss of every token after the first of each sequence, nats, with each sequence as one prompt."""
        ...

    def stats(self) -> dict[str, float]:
        """Returns counters since the start."""
        ...

    def close(self) -> None:
        """Ends the model's processes."""
        ...


class LlamaCpp:
    """llama.cpp with the model file memory-mapped, its default."""

    def __init__(self, task: Task) -> None:
        self._llama = need("llama_cpp").Llama(
            str(gguf_file(task)),
            n_ctx=task.length,
            logits_all=task.losses,
            n_batch=task.prompt_tokens,
            n_threads=len(os.sched_getaffinity(0)),
            n_threads_batch=len(os.sched_getaffinity(0)),
            use_mmap=True,
            verbose=False,
        )

    def best_tokens(self, ids: list[int], prompt_tokens: int) -> Iterator[int]:
        import numpy as np

        api, context = need("llama_cpp"), self._llama.ctx
        self._llama.reset()
        for part in (ids[:prompt_tokens], *([token] for token in ids[prompt_tokens:-1])):
            self._llama.eval(part)
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), shape=(self._llama.n_vocab(),))
            yield int(logits.argmax())

    def losses(self, sequences: list[list[int]]) -> list[float]:
        import numpy as np

        nats: list[float] = []
        for ids in sequences:
            self._llama.reset()
            self._llama.eval(ids)
            logits = np.array(self._llama.scores[: len(ids) - 1], dtype=np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(ids) - 1), ids[1:]]
            nats += (np.log(np.exp(logits).sum(axis=1)) - chosen).tolist()
        return nats

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class Transformers:
    """transformers with accelerate: weights beyond `cache_bytes` are read from disk on every use."""

    def __init__(self, task: Task) -> None:
        need("accelerate")
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(
            task.model,
            dtype="auto",
            device_map="auto",
            max_memory={"cpu": task.cache_bytes},
            offload_folder=str(Path(task.files) / OFFLOADED),
        )

    def best_tokens(self, ids: list[int], prompt_tokens: int) -> Iterator[int]:
        import torch

        past = None
        for part in (ids[:prompt_tokens], *([token] for token in ids[prompt_tokens:-1])):
            output = self._model(input_ids=torch.tensor([part]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            yield int(output.logits[0, -1].argmax())

    def losses(self, sequences: list[list[int]]) -> list[float]:
        raise AdapMoEError("transformers computes with the checkpoint's own weights; measure vllm")

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def vllm_engine(task: Task) -> Any:
    """Starts stock vLLM or the plugin, sized for one request at a time and the longest sequence."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process fewer under the limit
    from vllm_adapmoe.integration.measure.engine import Engine

    config: dict[str, Any] | None = None
    if task.contender != "vllm":
        config = {"cache_experts": task.slots, "store": "file", "store_dir": str(Path(task.files) / PACK)}
        config |= {"precision": PRECISIONS[task.contender]}
        config |= ON_DEMAND if task.contender == "adapmoe-lru" else {}
        config |= {} if task.profile is None else {"profile": task.profile}
        config |= GATED if task.contender == "adapmoe-gated" else {}
        config |= {} if task.trace is None else {"trace_out": task.trace}
    model = read_model_config(Path(task.model))
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    token = 2 * 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * head_dim  # keys, values; bfloat16
    blocks = -(-task.length // KV_BLOCK) + 2
    return Engine(
        task.model,
        config,
        max_model_len=task.length + 1,  # a prompt that is measured is followed by one token
        max_num_seqs=1,
        enforce_eager=task.enforce_eager,
        max_num_batched_tokens=max(task.prompt_tokens, 16),
        kv_cache_memory_bytes=blocks * KV_BLOCK * token,
        forced=True,
    )


class Vllm:
    """Stock vLLM or the plugin."""

    def __init__(self, task: Task) -> None:
        self._engine = vllm_engine(task)

    def best_tokens(self, ids: list[int], prompt_tokens: int) -> Iterator[int]:
        yield from self._engine.best_tokens(ids, prompt_tokens)

    def losses(self, sequences: list[list[int]]) -> list[float]:
        from vllm_adapmoe.integration.measure.losses import prefill_losses

        return prefill_losses(self._engine, sequences).nats.tolist()

    def stats(self) -> dict[str, float]:
        return self._engine.cache_stats()

    def close(self) -> None:
        self._engine.close()


CONTENDERS: dict[str, Callable[[Task], Contender]] = {
    **dict.fromkeys(FORMATS, LlamaCpp),
    "transformers": Transformers,
    "vllm": Vllm,
    **dict.fromkeys(PRECISIONS, Vllm),
}


def gguf_file(task: Task) -> Path:
    """Returns the path of llama.cpp's file."""
    return Path(task.files) / f"{FORMATS[task.contender] or 'BF16'}.gguf"


def read_bytes() -> int:
    """Returns bytes read from disk for this process and its children, page-cache misses included."""
    process = psutil.Process()
    return sum(member.io_counters().read_bytes for member in (process, *process.children(recursive=True)))


def answer(contender: Contender, ids: list[int], prompt_tokens: int) -> dict[str, Any]:
    """Runs one sequence; returns times, bytes read from disk, and the most probable token at each decoded position."""
    steps = contender.best_tokens(ids, prompt_tokens)
    start = time.perf_counter()
    best = [next(steps)]
    prefilled, before, stats = time.perf_counter(), read_bytes(), contender.stats()
    began = previous = time.perf_counter()
    seconds = []
    for token in steps:
        best.append(token)
        now = time.perf_counter()
        seconds.append(now - previous)
        previous = now
    after = contender.stats()
    return {
        "best": best,
        "prefill_seconds": prefilled - start,
        "decode_seconds": previous - began,
        "step_seconds": seconds,
        "decode_read_bytes": read_bytes() - before,
        "cache": {key: after[key] - stats[key] for key in after},
    }


def prepare(task: Task) -> dict[str, Any]:
    """Makes the GGUF file or packs the experts, unless they exist already for this checkpoint; returns their size."""
    if task.contender in FORMATS:
        from benchmarks.gguf_export import export, exported_from, quantise
        from vllm_adapmoe.integration.loading.identity import checkpoint_hash

        path, source = gguf_file(task), checkpoint_hash(Path(task.model))
        exported, format = gguf_file(replace(task, contender="llama.cpp")), FORMATS[task.contender]
        if exported_from(exported) != source:
            export(Path(task.model), exported, source)
        if format is not None and exported_from(path) != source:
            quantise(exported, path, format)
        return {"file_bytes": path.stat().st_size}
    from vllm_adapmoe.integration.loading.packing import pack_experts

    pack_experts(task.model, str(Path(task.files) / PACK), PRECISIONS[task.contender])
    return {"file_bytes": pack_file(Path(task.files), task.contender).stat().st_size}


def pack_file(files: Path, contender: str) -> Path:
    """Returns the path of the experts packed for a contender."""
    precision = PRECISIONS[contender]
    return files / PACK / f"experts-0-of-1{'' if precision == 16 else f'-int{precision}'}.pack"


def run(task: Task) -> dict[str, Any]:
    """Loads the contender and runs all sequences."""
    if task.prepare:
        return prepare(task)
    start = time.perf_counter()
    contender = CONTENDERS[task.contender](task)
    load_seconds = time.perf_counter() - start
    if task.losses:
        losses = contender.losses(task.sequences)
        contender.close()
        return {"losses": losses}
    answers = [answer(contender, ids, task.prompt_tokens) for ids in task.sequences]
    contender.close()
    return {"load_seconds": load_seconds, "answers": answers}


def main() -> None:
    """Runs the task and prints the result, or the error, as the last line."""
    task = Task(**json.loads(sys.argv[1]))
    try:
        result = run(task)
    except AdapMoEError as error:
        result = {"failure": str(error), "exit_code": 0}
    print(json.dumps(result), flush=True)
    os._exit(0)  # skip the shutdown messages of engine and libraries


if __name__ == "__main__":
    main()
