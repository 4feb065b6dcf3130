"""What a pool holds, expert by expert, read from its public state."""

from dataclasses import dataclass

import numpy as np

from vllm_adapmoe.cache.manager import ExpertCacheManager
from vllm_adapmoe.cache.slot_maps import SlotMaps
from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.events import State
from vllm_adapmoe.policy.residency import Residency


@dataclass
class Held:
    """One expert that is not absent."""

    state: State
    slot: int
    pins: int
    speculative: bool = False
    near_certain: bool = False
    cancelled: bool = False


def entries(pool: Residency) -> dict[ExpertKey, Held]:
    """All experts of a pool that are not absent."""
    found = {
        (layer, expert): Held(State.RESIDENT, int(pool.slots[layer, expert]), int(pool.pins[layer, expert]))
        for layer, expert in np.argwhere(pool.slots >= 0).tolist()
    }
    for key, entry in pool.entries.items():
        assert key not in found and entry.state is not State.RESIDENT
        flags = entry.speculative, entry.near_certain, entry.cancelled
        found[key] = Held(entry.state, entry.slot, int(pool.pins[key]), *flags)
    assert all(pool.pins[key] == 0 for key in np.ndindex(pool.pins.shape) if key not in found)
    return found


def use_pool(cache: ExpertCacheManager, index: int, pool: Residency) -> None:
    """Gives a cache that has run nothing yet another residency, e.g. with more staging slots than the setup allows."""
    cache.controller.pools[index] = pool
    experts = [cache.store.num_experts(layer) for layer in range(cache.store.num_layers)]
    cache.slot_maps = SlotMaps(cache.controller.pools, cache.pool_of_layer, experts)
