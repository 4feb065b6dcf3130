"""Whole engines: adapmoe against stock vLLM, and, at equal device memory, against vLLM's own ways of offloading."""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_adapmoe.bench.gpu_check.engine_process import EngineFailed, EngineProcess
from vllm_adapmoe.bench.gpu_check.report import NOT_RUN, Row, verdict
from vllm_adapmoe.bench.gpu_check.shapes import Shape
from vllm_adapmoe.bench.record import spread

SECTION = "vllm"
LAYERS = 8
"""Of the reduced model: two groups of vLLM's prefetch offloading."""
ROUNDS, TOKENS = 5, 65
FRACTIONS = (0.5, 0.25, 0.75)
"""In the order of interest, should time run out."""
LEAST_OF_STOCK, LEAST_OF_OTHERS = 0.97, 1.0
"""Of stock vLLM's decode, with every expert resident; of its own ways of offloading, in the same device memory."""
OTHERS = {"uva": "cpu_offload_gb", "prefetch": "prefetch offloading"}


def obstacle() -> str | None:
    """Why there are no engines to run."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM not importable: skipped"
    if not any(one.name == "adapmoe" for one in entry_points(group="vllm.general_plugins")):
        return "vllm-adapmoe not installed beside vLLM (pip install --no-deps .): skipped"
    return None


def model_config(shape: Shape, vocabulary: int = 151936) -> dict[str, Any]:
    """`config.json` of a Qwen3-MoE; attention as in Qwen3-30B-A3B, as far as the hidden size allows."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": 3 * shape.hidden, "moe_intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_experts": shape.experts, "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
        "head_dim": min(128, shape.hidden // 4), "num_attention_heads": min(32, shape.hidden // 16),
        "num_key_value_heads": min(4, shape.hidden // 32), "attention_bias": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 4096, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def check_engines(
    shape: Shape, ends: float, rounds: int = ROUNDS, tokens: int = TOKENS, fractions: Sequence[float] = FRACTIONS,
    vocabulary: int = 151936,
) -> Iterator[Row]:  # fmt: skip
    """Engines that are compared run beside each other and decode in turn, weights are random, batch 1.

    Args:
        shape: of the model.
        ends: until when, of `time.monotonic`.
        rounds: of every engine.
        tokens: decoded in a round.
        fractions: of experts on the device.
        vocabulary: of the model.
    """
    if (reason := obstacle()) is not None:
        yield Row(SECTION, "adapmoe in vLLM", reason, "", NOT_RUN)
        return
    expert_bytes = shape.layers * shape.experts * 3 * shape.hidden * shape.inner * 2
    with TemporaryDirectory(prefix="adapmoe-gpu-check-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config(shape, vocabulary)))
        for fraction in (1.0, *fractions):
            contenders = {"stock": "stock vLLM"} if fraction == 1.0 else OTHERS
            what = f"{shape.name}, {shape.layers} layers, {fraction:.0%} of the experts resident"
            if time.monotonic() > ends:
                yield Row(SECTION, what, "out of time", "", NOT_RUN)
                continue
            rest = (str(fraction), str(expert_bytes), str(tokens))
            speeds = _measure(["adapmoe", *contenders], lambda kind: [folder, kind, *rest], ends, rounds)  # noqa: B023
            for kind, name in contenders.items():
                least = LEAST_OF_STOCK if kind == "stock" else LEAST_OF_OTHERS
                yield _row(f"{what}: adapmoe / {name}", speeds["adapmoe"], speeds[kind], least)


def _measure(
    kinds: list[str], arguments: Callable[[str], list[str]], ends: float, rounds: int
) -> dict[str, list[float] | EngineFailed]:
    """Tokens per second of each engine, round by round, or why there are none."""
    speeds: dict[str, list[float] | EngineFailed] = {}
    with ExitStack() as stack:
        engines = {kind: stack.enter_context(closing(EngineProcess(arguments(kind), ends))) for kind in kinds}
        for kind, engine in list(engines.items()):
            try:
                engine.answer()
                speeds[kind] = []
            except EngineFailed as error:
                speeds[kind] = error
        for number in range(rounds):
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                measured = speeds[kind]
                if isinstance(measured, EngineFailed):
                    continue
                try:
                    measured.append(engines[kind].decode())
                except EngineFailed as error:
                    speeds[kind] = error
    return speeds


def _row(what: str, ours: list[float] | EngineFailed, theirs: list[float] | EngineFailed, least: float) -> Row:
    target = f">= {least}"
    for name, one in (("adapmoe", ours), ("the other", theirs)):
        if isinstance(one, EngineFailed):
            return Row(SECTION, what, f"{name}: {one}", target, NOT_RUN)
    assert not isinstance(ours, EngineFailed) and not isinstance(theirs, EngineFailed)
    ratio = spread([one / other for one, other in zip(ours, theirs, strict=True)])
    details = {"ratio": ratio, "adapmoe": spread(ours), "other": spread(theirs)}
    figure = (
        f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f}), {details['adapmoe']['median']:.1f} tokens/s"
    )
    return Row(SECTION, what, figure, target, verdict(ratio["median"] >= least), details)
