"""Loads the draft model of speculative decoding as vLLM does: its experts stay resident, and count as other weights."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.utils import get_model_architecture

from vllm_adapmoe.integration.loading.built_model import around_weights
from vllm_adapmoe.integration.loading.identity import weight_files
from vllm_adapmoe.integration.loading.memory import ModelWatch
from vllm_adapmoe.integration.model_info import drafter_of
from vllm_adapmoe.units import GiB

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def estimate_drafter(vllm_config: VllmConfig, layer_bytes: int) -> int:
    """Returns the bytes of the draft model's weights on this worker, before it is built; 0 without one.

    Args:
        vllm_config: resolved by vLLM.
        layer_bytes: bytes of a MoE decoder layer of the target, of which multi-token prediction heads are made.
    """
    drafter, speculative = drafter_of(vllm_config), vllm_config.speculative_config
    if drafter is None or speculative is None:
        return 0
    target = vllm_config.model_config
    if speculative.method == "mtp" and drafter.model in (target.model, target.model_weights):
        return layer_bytes * (getattr(drafter.hf_config, "n_predict", None) or 1)
    files = weight_files(drafter, speculative.draft_load_config or vllm_config.load_config)
    return sum(file.stat().st_size for file in files) // speculative.draft_parallel_config.tensor_parallel_size


@contextmanager
def resident_drafter(
    runner: Any, vllm_config: VllmConfig, target_ends: Callable[[], None], loaded: Callable[[int], None]
) -> Iterator[None]:
    """Makes the model runner load its draft model, which follows the target, with vLLM's own layers.

    Args:
        runner: vLLM's model runner.
        vllm_config: resolved by vLLM.
        target_ends: called before the draft model is built.
        loaded: called with the bytes of the draft model's weights.
    """
    drafter = drafter_of(vllm_config)
    if drafter is None:
        yield
        return
    proposer = getattr(runner, "drafter", None) or runner.speculator
    original = proposer.load_model
    model_class, _ = get_model_architecture(drafter)

    def load_model(*args: Any, **kwargs: Any) -> Any:
        target_ends()
        watch = ModelWatch()
        built: list[int] = []

        def measure() -> AbstractContextManager[None]:
            # Before weights are loaded: CPU kernels keep packed copies, in place of parameters. What the draft model
            # shares with the target afterwards, embeddings and head, is counted too.
            built.append(watch.bytes)
            return nullcontext()

        with watch.watching(), around_weights(model_class, measure):
            result = original(*args, **kwargs)
        nbytes = max(built, default=watch.bytes)  # dummy weights are not loaded
        _report(proposer.model, nbytes)
        loaded(nbytes)
        return result

    proposer.load_model = load_model
    try:
        yield
    finally:
        del proposer.load_model


def _report(model: nn.Module, nbytes: int) -> None:
    layers = [part for part in model.modules() if isinstance(part, RoutedExperts)]
    experts = sum(layer.local_num_experts for layer in layers)
    logger.info(
        "Expert cache: the draft model %s takes %.2f GiB%s", type(model).__name__, nbytes / GiB,
        f", with all {experts} experts of its {len(layers)} MoE layers resident" if layers else "",
    )  # fmt: skip
