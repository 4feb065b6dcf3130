"""Replaces and saves the weights of a running model through vLLM's worker methods, with experts in slots."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.layers.cached_experts import CachedExperts
from vllm_adapmoe.integration.loading.sharded_state import save_sharded_state
from vllm_adapmoe.integration.loading.slot_pools import slots_device
from vllm_adapmoe.integration.loading.weight_update import RecordUpdate, Weights, WeightUpdate
from vllm_adapmoe.integration.worker.expert_predictor import ExpertPredictor
from vllm_adapmoe.integration.worker.gpu_steps import GpuSteps
from vllm_adapmoe.store.base import StoreError

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

IN_PLACE = {"sparse_nccl", "nccl_m2n", "sharded_rdt", "modelexpress"}
"""Weight transfer backends that write into a model's parameters directly, bypassing its `load_weights`."""
READ_SLOTS = {
    "save_tensorized_model": "write it with save_sharded_state",
    "compute_weight_checksums": "compare what save_sharded_state writes",
    "reset_weights": "replace the weights with reload_weights",
}
"""Methods of vLLM's worker that would treat slots as weights, and their replacements; the last two since 0.33."""


class UpdatedWorker(Worker):
    """Mixin that makes `reload_weights` and weight transfer replace experts in a worker with cached MoE layers.

    The caller must ensure that no request runs meanwhile, and reset the prefix cache, as with vLLM's own worker.
    """

    _config: AdapMoEConfig
    moe_layers: list[CachedExperts]
    expert_cache: ExpertCacheManager | None
    predictor: ExpertPredictor | None
    gpu_steps: GpuSteps | None
    _update: WeightUpdate | None = None
    """Weight update in progress; None if there is none."""
    _records: RecordUpdate | None = None
    _dummy_weights: bool
    """Whether the engine was started with dummy weights, without a checkpoint."""
    broken: str | None = None
    """Reason why the weights are a mixture of old and new ones; None if they are consistent."""

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Replaces the weights like `GPUModelRunner.reload_weights`, experts included.

        Raises:
            AdapMoEError: the update failed; the message names what is served from now on: the old weights, or nothing
                until another update has replaced all of them.
        """
        self._reload_weights(*args, **kwargs)

    def _reload_weights(
        self,
        weights_iterator: Weights | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        if not is_checkpoint_format:
            self._check_parameters("reload_weights(is_checkpoint_format=False)", "send them in the checkpoint's format")
        update = self._begin_update("reload_weights")

        def reload() -> None:
            weights = weights_iterator
            if not is_checkpoint_format and weights is not None:
                weights = update.watch_copies(weights)
            with torch.no_grad():  # vLLM copies weights in the kernel's format into parameters with gradients
                super(UpdatedWorker, self).reload_weights(
                    weights_iterator=weights, weights_path=weights_path, is_checkpoint_format=is_checkpoint_format
                )
            self._finish(update)

        self._run_or_abort("reload_weights", reload)

    def _check_parameters(self, call: str, remedy: str) -> None:
        """Checks that the kernels read the parameters, so that weights may be written into them.

        Raises:
            AdapMoEError: parameters are slots, or empty because a CPU kernel has packed the weights.
        """
        model: nn.Module = self.model_runner.get_model()
        packed = next((name for name, parameter in model.named_parameters() if not parameter.numel()), None)
        if self.expert_cache is not None or packed is not None:
            reason = "experts are in slots" if self.expert_cache is not None else f"{packed} is packed for the CPU"
            raise AdapMoEError(f"{call} writes weights into parameters, and {reason}; {remedy}; nothing has changed")

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._check_backend("init_weight_transfer_engine")
        super().init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        """Begins a weight update, like vLLM's method.

        Raises:
            AdapMoEError: the backend would write into slots; nothing has changed.
        """
        self._check_backend("start_weight_update")
        if self._update is not None:
            super().start_weight_update()  # raises vLLM's error
        update = self._begin_update("start_weight_update")

        def start() -> None:
            super(UpdatedWorker, self).start_weight_update()
            if self.expert_cache is not None and not update.began_loading:
                super(UpdatedWorker, self).finish_weight_update()
                raise self._in_place()

        self._run_or_abort("start_weight_update", start)

    def update_weights(self, update_info: dict | list[dict]) -> None:
        """Receives weights of an update in progress, like vLLM's method.

        Raises:
            AdapMoEError: as in `reload_weights`.
        """
        update: Callable[[], None] = lambda: super(UpdatedWorker, self).update_weights(update_info)  # noqa: E731
        if self._update is None:
            update()  # raises vLLM's error
        self._run_or_abort("update_weights", update)

    def finish_weight_update(self) -> None:
        """Completes a weight update, like vLLM's method.

        Raises:
            AdapMoEError: as in `reload_weights`.
        """

        def finish() -> None:
            super(UpdatedWorker, self).finish_weight_update()
            assert self._update is not None
            self._finish(self._update)

        if self._update is None:
            super().finish_weight_update()  # raises vLLM's error
        self._run_or_abort("finish_weight_update", finish)

    def save_sharded_state(self, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        """Saves a sharded state like vLLM's method, with experts from the store where parameters are slots.

        Raises:
            AdapMoEError: the weights are being replaced, or were replaced only in part; or they are quantised by
                `precision`, of which a sharded state says nothing.
        """
        if self._config.bits != 16:
            raise AdapMoEError(
                f"save_sharded_state does not work with precision={self._config.precision}: vLLM would load the state "
                "as unquantised weights; save it without precision"
            )
        cache = self.expert_cache
        if cache is None:
            return super().save_sharded_state(path, pattern, max_size)
        if self._update is not None or self.broken is not None:
            raise AdapMoEError(f"save_sharded_state: {self.broken or 'the weights are being replaced'}")
        return save_sharded_state(
            self.model_runner.get_model(), cache, RecordUpdate(cache).records, path, pattern, max_size
        )

    def guard_weights(self) -> None:
        """Makes methods that would read or write parameters as weights raise, where these are slots."""
        model: Any = self.model_runner.get_model()
        load_weights = model.load_weights

        def guarded(weights: Weights, *args: Any, **kwargs: Any) -> Any:
            """Checks the parameters before a trainer's direct call, and the loaded names during an update."""
            if self._update is None:
                self._check_parameters("load_weights of a running model", "call reload_weights with weights_iterator")
                return load_weights(weights, *args, **kwargs)
            loaded = load_weights(weights, *args, **kwargs)
            self._update.check_loaded(set(loaded or ()))
            return loaded

        model.load_weights = guarded
        for layer in self.moe_layers:
            layer.serving = True

        def refuse(call: str, remedy: str, *args: Any, **kwargs: Any) -> None:
            raise AdapMoEError(
                f"{call} reads or writes parameters, which hold slots instead of weights; {remedy}, or start "
                "with a slot for every expert"
            )

        for name, remedy in READ_SLOTS.items():
            if self.expert_cache is not None and hasattr(self, name):
                setattr(self, name, partial(refuse, name, remedy))

    def _check_backend(self, call: str) -> None:
        transfer = self.vllm_config.weight_transfer_config
        if self.expert_cache is not None and transfer is not None and transfer.backend in IN_PLACE:
            raise AdapMoEError(f"{call}: {self._in_place()}")

    def _in_place(self) -> AdapMoEError:
        transfer = self.vllm_config.weight_transfer_config
        assert transfer is not None
        return AdapMoEError(
            f"weight_transfer_config backend={transfer.backend!r} writes into parameters, which hold slots of the "
            "expert cache; use nccl, ipc or reload_weights"
        )

    def _begin_update(self, call: str) -> WeightUpdate:
        if self._update is not None:
            raise AdapMoEError(f"{call}: another weight update is in progress; call finish_weight_update first")
        cache = self.expert_cache
        if self.gpu_steps is not None:
            torch.accelerator.synchronize()
            self.gpu_steps.drain_finished(self.predictor)
            self.gpu_steps.give_back()
        if cache is not None and self._records is None:
            self._records = RecordUpdate(cache)
        model: nn.Module = self.model_runner.get_model()
        update, reason = None, "another rank cannot replace its weights"
        try:
            update = WeightUpdate(
                model, self.moe_layers, cache, self._records, self.vllm_config.model_config, self._dummy_weights
            )
        except (AdapMoEError, StoreError) as error:
            reason = str(error)
        if not _all_ranks(update is not None):
            if update is not None:
                update.abort()
            raise AdapMoEError(f"{call}: {reason}; nothing has changed")
        assert update is not None
        self._update = update
        return update

    def _finish(self, update: WeightUpdate) -> None:
        with_experts = update.finish()
        self._update = None
        if with_experts:
            self.broken = None
        if self.broken is not None:
            raise AdapMoEError(f"no experts were received; {self.broken}")
        if self.predictor is not None:
            dtype: Any = self.model_config.dtype
            self.predictor.follow_weights(dtype, slots_device())
        if with_experts and self.expert_cache is not None:
            logger.info(
                "Expert cache: the experts were replaced, and all slots are empty; a pack on disk still holds the "
                "previous weights"
            )
        if self._config.profile is not None:
            logger.info(
                "Expert cache: profile=%r was made from the weights that the engine started with, and only "
                "approximates the new ones; calibrate again", self._config.profile,
            )  # fmt: skip

    def _run_or_abort(self, call: str, action: Callable[[], None]) -> None:
        """Runs a part of the current update; an error on any rank aborts the update on every rank.

        Raises:
            AdapMoEError: the update was aborted.
        """
        error: BaseException | None = None
        try:
            action()
        except BaseException as failure:
            error = failure
        if _all_ranks(error is None):
            return
        update, self._update = self._update, None
        as_before = _all_ranks(update is not None and update.abort())
        reason = "another rank has failed" if error is None else " ".join(str(error).split()) or type(error).__name__
        if as_before and self.broken is None:
            raise AdapMoEError(f"{call}: {reason}; the old weights are served") from error
        if not as_before:
            self.broken = "the model holds weights of two checkpoints: replace all of them, or restart the engine"
        raise AdapMoEError(f"{call}: {reason}; every request fails from now on: {self.broken}") from error


def _all_ranks(succeeded: bool) -> bool:
    """Returns whether `succeeded` is true on every rank. Collective: every rank must call it."""
    group = get_tp_group()
    if group.world_size == 1:
        return succeeded
    all_succeeded = torch.tensor(int(succeeded))
    dist.all_reduce(all_succeeded, dist.ReduceOp.MIN, group=group.cpu_group)
    return bool(all_succeeded)
