"""DeviceDecode: decode steps whose experts the GPU manages itself, without the host in between."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_adapmoe.cache.host_copy import HostCopy
from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.layer_input import Chosen, Predicted
from vllm_adapmoe.device.residency import COUNTERS, DeviceResidency, Loads
from vllm_adapmoe.gating.rules import Gated
from vllm_adapmoe.policy.gpu_state import GpuCounts, fitting_tokens
from vllm_adapmoe.store.base import ExpertStore

if TYPE_CHECKING:
    from vllm_adapmoe.device.batch_gate import Adapted, BatchGate

DEMAND, AHEAD = 0, 1


class DeviceDecode:
    """Runs steps of few tokens without the host: the GPU decides what to load and whom to evict, and copies it.

    Either the host has the cache or the GPU has: `take` hands it to the GPU, `give_back` to the host. Steps of the GPU
    launch the same kernels whatever is resident, so one CUDA graph holds a whole step.

    Args:
        cache: cache whose store is page-locked.
        top_k: experts per token, the maximum where layers differ.
        max_ahead: maximum prefetches for the next layer in each layer.
        device: device of the slots.

    Raises:
        ValueError: the device cannot read the store.
    """

    def __init__(self, cache: ExpertCacheManager, top_k: int, max_ahead: int, device: torch.device) -> None:
        from vllm_adapmoe.device.claim import claim  # needs Triton
        from vllm_adapmoe.device.fetch import Fetch

        self._claim, self._fetch_class = claim, Fetch
        self.cache, self.device, self.max_ahead = cache, device, max_ahead
        self.top_k = top_k
        self.max_tokens = max_tokens(cache, top_k)
        """Maximum tokens of a step: as many as their experts have slots for."""
        self.routing = DeferredRouting(cache.store.num_layers, self.max_tokens, top_k, device)
        self.owns = False
        """Whether the GPU has the cache."""
        self.running = False
        """Whether a step of the GPU is being launched."""
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prefetching = False
        """Whether copies may be in flight on the second stream."""
        self.batch_gate: BatchGate | None = None
        """Gates by batch; None: nothing is gated so."""
        self._counters: deque[HostCopy] = deque()
        """Counters and residents of each pool after each step, in flight to the host."""
        self.rebuild()

    def rebuild(self) -> None:
        """Allocates the state on the device: at the start, and after the pools' slots were replaced."""
        cache, store = self.cache, self.cache.store
        assert not self.owns
        self.max_tokens = min(self.max_tokens, max_tokens(cache, self.top_k))
        addresses = record_addresses(store)
        pool_of = np.array(cache.pool_of_layer)
        self.pools = [
            DeviceResidency(
                residency, torch.from_numpy(np.where((pool_of == index)[:, None], addresses, 0)).to(self.device),
                self.device,
            )
            for index, residency in enumerate(cache.controller.pools)
        ]  # fmt: skip
        self._fetches = [self._fetch_class(pool) for pool in cache.pools]
        self._loads = Loads(max(addresses.shape[1], self.max_ahead), self.device)
        self._seen = [np.zeros(len(pool.counters), np.int64) for pool in self.pools]

    def take(self) -> None:
        """Hands the cache to the GPU, unless it has it already; ends transfers in flight."""
        if self.owns:
            return
        staged = self.cache.lend()
        for index, pool in enumerate(self.pools):
            of_pool = [key for key in staged if self.cache.pool_of_layer[key[0]] == index]
            pool.upload(self.cache.controller.pools[index], of_pool)
            self._seen[index].fill(0)
        if self.batch_gate is not None:
            self.batch_gate.upload()
        self.owns = True

    def give_back(self) -> None:
        """Hands the cache back to the host, unless it has it already; waits for the GPU."""
        if not self.owns:
            return
        self._copy_counters()
        while self._counters:
            copy = self._counters.popleft()
            copy.wait()
            self._count(copy)
        self._hand_back(uses=True)

    def _hand_back(self, uses: bool) -> None:
        """Waits for the GPU, and hands its state to the host (`ExpertCacheManager.take_back`)."""
        states = [pool.download() for pool in self.pools]
        if self.batch_gate is not None:
            self.batch_gate.download()
        self.owns = False
        self.cache.take_back(states, uses)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Gives the GPU the cache for steps that are no traffic: all of their rows are padding, and load nothing."""
        self.give_back()
        self.take_for_padding()
        yield  # after an error vLLM does not start, and the cache stays where it is
        self._counters.clear()
        self._hand_back(uses=False)

    def take_for_padding(self) -> None:
        """Hands the cache to the GPU for a step without requests, all of whose rows are padding."""
        self.take()
        self.routing.rows.zero_()

    @contextmanager
    def step(self, tokens: int, payload: Any) -> Iterator[None]:
        """Opens a context to launch a step of at most `max_tokens` tokens; its routing is returned with `payload`."""
        self.take()
        self.routing.begin_step(tokens)
        self.running = True
        try:
            yield
        finally:
            self.running = False
            self._join()  # after an error within the step, prefetches may be in flight
        self.routing.close_step(tokens, payload, list(range(self.cache.store.num_layers)))
        self._copy_counters()

    def use_gating(self, gating: "Adapted | None") -> None:
        """Gates by batch from the next step on; None: no longer."""
        from vllm_adapmoe.device.batch_gate import BatchGate

        self.give_back()
        self.batch_gate = None if gating is None else BatchGate(gating, len(self.pools[0].wait[0]), self.device)

    def gate_batch(self, layer: int, weights: torch.Tensor, ids: torch.Tensor) -> Gated:
        """Gates a layer of a step by what is resident now (`BatchGate`)."""
        assert self.batch_gate is not None
        pool = self.pools[self.cache.pool_of_layer[layer]]
        return self.batch_gate(layer, weights, ids, self.routing.rows, pool.slot_of)

    def experts(self, layer: int, chosen: Chosen, predicted: Predicted | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes the experts of one layer resident, and begins to prefetch for the next; launches and waits for nothing.

        Args:
            layer: MoE layer index; layers are called in their order.
            chosen: the layer's choice; contiguous.
            predicted: for the layer's next event, and for the next layer; None: no predictions.

        Returns:
            The slot of each expert, -1 if it has none, int32 `[experts + 1]`, for kernels launched from here on; and
            `chosen.ids`, with the number of experts for padding and dropped pairs.
        """
        index = self.cache.pool_of_layer[layer]
        pool, fetch = self.pools[index], self._fetches[index]
        experts = self.cache.store.num_experts(layer)
        self._join()
        ids = self._claim(pool, self._loads, layer, chosen, self.routing, predicted, self.max_ahead, experts)
        fetch(self._loads, DEMAND)
        if predicted is not None and predicted.ahead is not None and self.max_ahead and layer + 1 < len(pool.records):
            self._prefetch(fetch)
        return pool.slot_of[layer][: experts + 1], ids  # -1 follows the experts, in layers of fewer than others, too

    def _prefetch(self, fetch: Any) -> None:
        """Copies prefetches on the second stream, after the demand loads: they would share the link."""
        if self._side is None:
            fetch(self._loads, AHEAD)
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            fetch(self._loads, AHEAD)
        self._prefetching = True

    def _join(self) -> None:
        """Waits, on the device, for the prefetches: the next event may use or evict them, and reuses their list."""
        if self._prefetching and self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._prefetching = False

    def _copy_counters(self) -> None:
        self._counters.append(HostCopy(*(each for pool in self.pools for each in (pool.counters, pool.count))))

    def count(self) -> None:
        """Adds what finished steps have counted to the cache's statistics, without waiting for other steps."""
        while self._counters and self._counters[0].arrived:
            self._count(self._counters.popleft())

    def _count(self, copy: HostCopy) -> None:
        for index, seen in enumerate(self._seen):
            counters, residents = (tensor.numpy() for tensor in copy.tensors[2 * index : 2 * index + 2])
            of_pool = dict(zip(COUNTERS, (counters - seen)[: len(COUNTERS)].tolist(), strict=True))
            if of_pool.pop("lost"):
                raise RuntimeError(
                    f"a step needed more experts of pool {index} than it has slots: tokens are wrong; set decode=host"
                )
            hits, misses = (counters - seen)[len(COUNTERS) :].reshape(-1, 2).T
            self.cache.count_on_device(index, GpuCounts(**of_pool, hits=hits, misses=misses, residents=residents))
            seen[:] = counters


def max_tokens(cache: ExpertCacheManager, top_k: int) -> int:
    """Returns the maximum tokens of a step whose experts are certain to fit the slots; 0: not even one token's do."""
    layers = range(cache.store.num_layers)
    slots = [cache.pool(layer).num_slots for layer in layers]
    return fitting_tokens([cache.store.num_experts(layer) for layer in layers], slots, top_k, MAX_TOKENS)


def record_addresses(store: ExpertStore) -> np.ndarray:
    """Returns the address of each expert's record, int64 `[layers, experts]`; 0 beyond the experts of a smaller layer.

    Raises:
        ValueError: a record is not in page-locked memory.
    """
    counts: Sequence[int] = [store.num_experts(layer) for layer in range(store.num_layers)]
    addresses = np.zeros((len(counts), max(counts)), dtype=np.int64)
    for layer, experts in enumerate(counts):
        for expert in range(experts):
            record = store.page_locked((layer, expert))
            if record is None:
                raise ValueError(f"expert {expert} of MoE layer {layer} is not in page-locked memory")
            addresses[layer, expert] = record.data_ptr()
    return addresses
