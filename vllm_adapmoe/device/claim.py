"""Decides one layer's event on the GPU: which experts are missing, whom they evict, and what to prefetch.

One program of one kernel, which decides what `CacheController` decides for the same routing: the same arithmetic
(`expected_wait`), the same victims, the same slots. Prefetches are for the next layer alone. Its decisions depend on
nothing but the routing so far, so ranks agree, and a replay counts the same. What would be small kernels around it is
done by the way: padding and dropped pairs are masked, the routing is recorded, a head's chances are combined.

The state of the cache is in global memory (`DeviceResidency`). Each layer's best victim is kept there, so that an
eviction looks at one number per layer, and at the experts of the layer that lost one.
"""

from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_adapmoe.device.deferred import DeferredRouting
from vllm_adapmoe.device.layer_input import Chosen, Predicted
from vllm_adapmoe.device.residency import COUNTERS, DeviceResidency, Loads
from vllm_adapmoe.policy import expected_wait
from vllm_adapmoe.policy.chances import MAX_PROB, MIN_PROB, STEPS
from vllm_adapmoe.policy.expected_wait import EVENT, UNIT

NO_VICTIM = tl.constexpr(-(1 << 62))
"""Wait of a layer without an evictable expert."""
PREFETCHES, PREFETCH_HITS, WASTED, LOST = (tl.constexpr(place) for place in range(4))
"""Places of `COUNTERS`."""
ROWS_AT_ONCE = 8
"""Rows whose chances are read together."""
OF_LAYERS = tl.constexpr(len(COUNTERS))
"""Place of the first layer's hits."""


def _jit(function: Any) -> Any:
    """Compiles plain arithmetic. Triton's interpreter looks for `tl` among its globals, its compiler for `Any`."""
    names = {**function.__globals__, "tl": tl, "Any": tl.constexpr(None)}
    return triton.jit(FunctionType(function.__code__, names, function.__name__))


_next_rate, _use_chance = _jit(expected_wait.next_rate), _jit(expected_wait.use_chance)
_mixed_chance, _expected_wait = _jit(expected_wait.mixed_chance), _jit(expected_wait.expected_wait)


@triton.jit
def _count(chosen, EXPERT_BLOCK: tl.constexpr):
    """Returns how often each expert occurs among ids, int32 `[EXPERT_BLOCK]`; negative ids do not count."""
    return tl.histogram(tl.where(chosen >= 0, chosen, 0), EXPERT_BLOCK, mask=chosen >= 0)


@triton.jit
def _kept(
    ids, keep_mask, cost, rows, recorded, recorded_cost, kernel_ids, pairs, absent,
    PAIRS: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Returns kept ids, int32 `[PAIRS]`, -1: dropped or padding; records them, and writes ids for the kernel."""
    pair = tl.arange(0, PAIRS)
    inside = pair < pairs
    chosen = tl.load(ids + pair, mask=inside, other=-1).to(tl.int32)
    kept = inside & (chosen >= 0) & (pair < rows * TOP_K)
    if GATED:
        kept = kept & (tl.load(keep_mask + pair, mask=inside, other=0) != 0)
        row = pair < pairs // TOP_K
        tl.store(recorded_cost + pair, tl.load(cost + pair, mask=row, other=0.0), mask=row)
    tl.store(kernel_ids + pair, tl.where(kept, chosen, absent).to(kernel_ids.dtype.element_ty), mask=inside)
    chosen = tl.where(kept, chosen, -1)
    tl.store(recorded + pair // TOP_K * WIDTH + pair % TOP_K, chosen, mask=inside)
    return chosen


@triton.jit
def _chance_of_any(
    outputs, rows, stride, experts, expert, EXPERT_BLOCK: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr, MIN_PROB: tl.constexpr, MAX_PROB: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Returns chances in units of 1 / `UNIT`, int64 `[EXPERT_BLOCK]`, as `chances.chance_of_any` does for `rows`.

    In the order of the rows. Experts beyond those of the head have no chance.
    """
    unused = tl.full([EXPERT_BLOCK], 1.0, tl.float64)
    least, most = tl.full([EXPERT_BLOCK], MIN_PROB, tl.float64), tl.full([EXPERT_BLOCK], MAX_PROB, tl.float64)
    for start in range(0, rows, ROWS_AT_ONCE):
        for number in tl.static_range(ROWS_AT_ONCE):  # whose loads are all in flight before the first is used
            row = start + number
            inside = (expert < experts) & (row + 0 * expert < rows)
            chance = tl.load(outputs + row * stride + expert, mask=inside, other=0.0).to(tl.float64)
            unused = unused * tl.where(inside, 1.0 - tl.minimum(tl.maximum(chance, least), most), 1.0)
    steps = (1.0 - unused) * STEPS
    whole = tl.floor(steps)
    rest = steps - whole
    odd = whole.to(tl.int64) % 2 == 1
    whole = tl.where((rest > 0.5) | ((rest == 0.5) & odd), whole + 1.0, whole)  # a half to the even one, as Python does
    return tl.where(expert < experts, whole.to(tl.int64) * (UNIT // STEPS), 0)


@triton.jit
def _best_victim(wait, slots, kept, expert, EXPERT_BLOCK: tl.constexpr):
    """Returns a layer's expert with the longest wait, of equal ones the first, and its wait; -1: none is evictable."""
    reach = tl.where((slots >= 0) & (kept == 0), wait, NO_VICTIM)
    longest = tl.max(reach, 0)
    first = tl.min(tl.where(reach == longest, expert, EXPERT_BLOCK), 0)
    return tl.where(longest == NO_VICTIM, -1, first), longest


@triton.jit
def _take_slot(
    slot_of, wait, floors, free, num_free, best, best_wait, count, prefetched, counters,
    for_layer, event_layer, limit, needed, ahead_layer, expected,
    LAYERS: tl.constexpr, EXPERTS: tl.constexpr, LAYER_BLOCK: tl.constexpr, EXPERT_BLOCK: tl.constexpr,
    BY_DISTANCE: tl.constexpr, FLOORS: tl.constexpr, EVENT: tl.constexpr,
):  # fmt: skip
    """Takes a free slot, or that of the victim if its wait exceeds `limit`; returns the slot, -1: none, and the state.

    Args, beside the state:
        for_layer: layer of the expert that gets the slot.
        event_layer: layer of the event, whose `needed` experts are not evicted.
        limit: minimum wait of a victim.
        ahead_layer: layer to prefetch for, whose `expected` experts are not evicted; -1: none.
    """
    slot = -1
    if num_free > 0:
        num_free -= 1
        slot = tl.load(free + num_free)
    else:
        layer = tl.arange(0, LAYER_BLOCK)
        reach = best_wait
        if BY_DISTANCE:
            reach += ((layer - event_layer - 1 + LAYERS) % LAYERS + 1).to(tl.int64) * EVENT
        reach = tl.where(best >= 0, reach, NO_VICTIM)
        if FLOORS:
            floor = tl.load(floors + layer, mask=layer < LAYERS, other=0)
            above = (best >= 0) & tl.where(layer == for_layer, count >= floor, count > floor)
            if tl.max(above.to(tl.int32), 0) > 0:
                reach = tl.where(above, reach, NO_VICTIM)
        longest = tl.max(reach, 0)
        if longest > limit:
            loser = tl.min(tl.where(reach == longest, layer, LAYER_BLOCK), 0)
            victim = tl.max(tl.where(layer == loser, best, -1), 0)
            place = slot_of + loser.to(tl.int64) * (EXPERTS + 1) + victim
            slot = tl.load(place)
            tl.debug_barrier()  # all threads have read the slot
            tl.store(place, -1)
            flag = prefetched + loser.to(tl.int64) * EXPERTS + victim
            unused = tl.load(flag)
            tl.debug_barrier()
            tl.store(flag, 0)
            tl.store(counters + WASTED, tl.load(counters + WASTED) + unused)
            tl.debug_barrier()
            expert = tl.arange(0, EXPERT_BLOCK)
            mask = expert < EXPERTS
            slots = tl.load(slot_of + loser.to(tl.int64) * (EXPERTS + 1) + expert, mask=mask, other=-1)
            waits = tl.load(wait + loser.to(tl.int64) * EXPERTS + expert, mask=mask, other=0)
            kept = tl.where(loser == event_layer, needed, 0) + tl.where(loser == ahead_layer, expected, 0)
            next_best, next_wait = _best_victim(waits, slots, kept, expert, EXPERT_BLOCK)
            best = tl.where(layer == loser, next_best, best)
            best_wait = tl.where(layer == loser, next_wait, best_wait)
            count = tl.where(layer == loser, count - 1, count)
    return slot, num_free, best, best_wait, count


# Not specialised on numbers that change from layer to layer and step to step, which would recompile the kernel.
@triton.jit(
    do_not_specialize=["layer", "pairs", "absent", "ahead_pairs", "max_ahead", "outputs_stride", "head_experts"]
)
def _claim(
    ids, keep_mask, cost, step_rows, recorded, recorded_cost, kernel_ids, outputs, ahead_ids, records,
    slot_of, quick, slow, wait, best_of, best_wait_of, count_of, floors, free, scalars, prefetched, counters,
    loads, num_loads,
    layer, pairs, absent, outputs_stride, head_experts, ahead_pairs, max_ahead, ahead_limit,
    quick_rate, slow_rate, weight, floor, share,
    LAYERS: tl.constexpr, EXPERTS: tl.constexpr, LAYER_BLOCK: tl.constexpr, EXPERT_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, AHEAD_PAIRS: tl.constexpr,
    AHEAD_TOP_K: tl.constexpr, GATED: tl.constexpr, BY_DISTANCE: tl.constexpr,
    HEADS: tl.constexpr, AHEAD: tl.constexpr, FLOORS: tl.constexpr, MAX_LOADS: tl.constexpr, UNIT: tl.constexpr,
    EVENT: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, MIN_PROB: tl.constexpr, MAX_PROB: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, EXPERT_BLOCK)
    mask = expert < EXPERTS
    row = layer.to(tl.int64) * EXPERTS + expert
    map_row = layer.to(tl.int64) * (EXPERTS + 1) + expert
    record = tl.load(records + row, mask=mask, other=0)
    rows = tl.minimum(tl.load(step_rows), pairs // TOP_K)
    kept = _kept(
        ids, keep_mask, cost, rows, recorded + layer.to(tl.int64) * ROWS * WIDTH, recorded_cost + layer * ROWS,
        kernel_ids, pairs, absent, PAIRS, TOP_K, WIDTH, GATED,
    )  # fmt: skip
    needed = ((_count(kept, EXPERT_BLOCK) > 0) & (record != 0)).to(tl.int32)

    # The event's use, as the eviction policy records it. With fewer experts than threads, several threads have the same
    # expert: all of them have read what it was before one of them writes what it is.
    events = tl.load(scalars + 1)
    slots = tl.load(slot_of + map_row, mask=mask, other=-1)
    flags = tl.load(prefetched + row, mask=mask, other=0)
    fast = tl.load(quick + row, mask=mask, other=0).to(tl.int64)
    slower = tl.load(slow + row, mask=mask, other=0).to(tl.int64)
    waits = tl.load(wait + row, mask=mask, other=0)
    tl.debug_barrier()
    if BY_DISTANCE:
        used = needed.to(tl.int64)
        fast = _next_rate(fast, used, quick_rate, UNIT)
        slower = _next_rate(slower, used, slow_rate, UNIT)
        tl.store(quick + row, fast.to(tl.int32), mask=mask)
        tl.store(slow + row, slower.to(tl.int32), mask=mask)
        chance = _use_chance(fast, slower, weight, floor, UNIT)
        if HEADS:
            predicted = _chance_of_any(
                outputs, rows, outputs_stride, head_experts, expert, EXPERT_BLOCK,
                ROWS_AT_ONCE, MIN_PROB, MAX_PROB, STEPS, UNIT,
            )  # fmt: skip
            chance = tl.maximum(_mixed_chance(chance, predicted, share, UNIT), floor)
        waits = _expected_wait(chance, LAYERS, EVENT, UNIT)
    else:
        waits = tl.where(needed != 0, -events, waits)
    tl.store(wait + row, waits, mask=mask)

    # Hits and misses.
    hit = needed * (slots >= 0).to(tl.int32)
    num_hits = tl.sum(hit, 0)
    num_missing = tl.sum(needed, 0) - num_hits
    was_prefetched = flags * hit
    tl.store(prefetched + row, 0, mask=mask & (hit != 0))
    place = counters + OF_LAYERS + layer * 2
    tl.store(place, tl.load(place) + num_hits)
    tl.store(place + 1, tl.load(place + 1) + num_missing)
    tl.store(counters + PREFETCH_HITS, tl.load(counters + PREFETCH_HITS) + tl.sum(was_prefetched, 0))

    # Demand loads, in the order of their ids.
    index = tl.arange(0, LAYER_BLOCK)
    layer_mask = index < LAYERS
    best = tl.load(best_of + index, mask=layer_mask, other=-1)
    best_wait = tl.load(best_wait_of + index, mask=layer_mask, other=NO_VICTIM)
    count = tl.load(count_of + index, mask=layer_mask, other=0)
    num_free = tl.load(scalars)
    nothing = tl.zeros_like(needed)
    own_best, own_wait = _best_victim(waits, slots, needed, expert, EXPERT_BLOCK)
    best = tl.where(index == layer, own_best, best)
    best_wait = tl.where(index == layer, own_wait, best_wait)
    missing = needed * (slots < 0).to(tl.int32)
    lost = 0
    tl.debug_barrier()
    for number in range(num_missing):
        chosen = tl.min(tl.where(missing != 0, expert, EXPERT_BLOCK), 0)
        slot, num_free, best, best_wait, count = _take_slot(
            slot_of, wait, floors, free, num_free, best, best_wait, count, prefetched, counters,
            layer, layer, NO_VICTIM, needed, -1, nothing,
            LAYERS, EXPERTS, LAYER_BLOCK, EXPERT_BLOCK, BY_DISTANCE, FLOORS, EVENT,
        )  # fmt: skip
        tl.store(loads + 2 * number, tl.sum(tl.where(expert == chosen, record, 0), 0))
        tl.store(loads + 2 * number + 1, slot.to(tl.int64))
        tl.store(slot_of + layer.to(tl.int64) * (EXPERTS + 1) + chosen, slot)
        count = tl.where(index == layer, count + 1, count)
        lost += (slot < 0).to(tl.int32)
        missing = tl.where(expert == chosen, 0, missing)
    tl.store(num_loads, num_missing)
    tl.store(counters + LOST, tl.load(counters + LOST) + lost)

    # Prefetches for the next layer: those that most tokens are predicted to use, over slots of less value.
    num_ahead = 0
    if AHEAD:
        target = layer + 1
        ahead_row = target.to(tl.int64) * EXPERTS + expert
        ahead_map_row = target.to(tl.int64) * (EXPERTS + 1) + expert
        ahead_record = tl.load(records + ahead_row, mask=mask, other=0)
        ahead_pair = tl.arange(0, AHEAD_PAIRS)
        voting = ahead_pair < tl.minimum(ahead_pairs, rows * AHEAD_TOP_K)
        votes = _count(tl.load(ahead_ids + ahead_pair, mask=voting, other=-1).to(tl.int32), EXPERT_BLOCK)
        votes = tl.where(ahead_record != 0, votes, 0)
        tl.debug_barrier()
        ahead_slots = tl.load(slot_of + ahead_map_row, mask=mask, other=-1)
        ahead_waits = tl.load(wait + ahead_row, mask=mask, other=0)
        its_best, its_wait = _best_victim(ahead_waits, ahead_slots, votes, expert, EXPERT_BLOCK)
        best = tl.where(index == target, its_best, best)
        best_wait = tl.where(index == target, its_wait, best_wait)
        wanted = tl.where(ahead_slots < 0, votes, 0)
        if not BY_DISTANCE:
            ahead_limit = ahead_limit - events - 1
        room = tl.minimum(max_ahead, tl.sum((wanted != 0).to(tl.int32), 0))
        while num_ahead < room:
            most = tl.max(wanted, 0)
            chosen = tl.min(tl.where(wanted == most, expert, EXPERT_BLOCK), 0)
            slot, num_free, best, best_wait, count = _take_slot(
                slot_of, wait, floors, free, num_free, best, best_wait, count, prefetched, counters,
                target, layer, ahead_limit, needed, target, votes,
                LAYERS, EXPERTS, LAYER_BLOCK, EXPERT_BLOCK, BY_DISTANCE, FLOORS, EVENT,
            )  # fmt: skip
            if slot >= 0:
                entry = loads + 2 * (MAX_LOADS + num_ahead)
                tl.store(entry, tl.sum(tl.where(expert == chosen, ahead_record, 0), 0))
                tl.store(entry + 1, slot.to(tl.int64))
                tl.store(slot_of + target.to(tl.int64) * (EXPERTS + 1) + chosen, slot)
                tl.store(prefetched + target.to(tl.int64) * EXPERTS + chosen, 1)
                count = tl.where(index == target, count + 1, count)
                wanted = tl.where(expert == chosen, 0, wanted)
                num_ahead += 1
            else:
                room = num_ahead
        tl.debug_barrier()
        ahead_slots = tl.load(slot_of + ahead_map_row, mask=mask, other=-1)
        its_best, its_wait = _best_victim(ahead_waits, ahead_slots, nothing, expert, EXPERT_BLOCK)
        best = tl.where(index == target, its_best, best)
        best_wait = tl.where(index == target, its_wait, best_wait)
        tl.store(counters + PREFETCHES, tl.load(counters + PREFETCHES) + num_ahead)
    tl.store(num_loads + 1, num_ahead)

    # What the event needed may be evicted by the next one.
    tl.debug_barrier()
    slots = tl.load(slot_of + map_row, mask=mask, other=-1)
    own_best, own_wait = _best_victim(waits, slots, nothing, expert, EXPERT_BLOCK)
    tl.store(best_of + index, tl.where(index == layer, own_best, best), mask=layer_mask)
    tl.store(best_wait_of + index, tl.where(index == layer, own_wait, best_wait), mask=layer_mask)
    tl.store(count_of + index, count, mask=layer_mask)
    tl.store(scalars, num_free)
    tl.store(scalars + 1, events + 1)
    tl.store(scalars + 2, layer)


def claim(
    residency: DeviceResidency,
    loads: Loads,
    layer: int,
    chosen: Chosen,
    routing: DeferredRouting,
    predicted: Predicted | None = None,
    max_ahead: int = 0,
    absent: int | None = None,
) -> torch.Tensor:
    """Decides one event of a layer: updates `residency`, and writes what has to be copied to `loads`. One launch.

    Args:
        residency: the state of the layer's pool.
        loads: receives the demand loads and the prefetches.
        layer: MoE layer index.
        chosen: the layer's choice; the distinct experts that are kept are at most the pool's slots. Contiguous.
        routing: has the number of rows that are no padding; receives what is kept, and its cost.
        predicted: for the layer's next event, and for the next layer; contiguous. None: no predictions, no prefetch.
        max_ahead: maximum prefetches.
        absent: id for dropped pairs; None: the maximum of experts of any layer.

    Returns:
        Ids as in `chosen.ids`, with `absent` for dropped pairs and padding.
    """
    state, predicted = residency, predicted or Predicted()
    ids, outputs, ahead = chosen.ids, predicted.outputs, predicted.ahead
    layers, experts = state.wait.shape
    rows, width = routing.ids.shape[1:]
    prefetches = ahead is not None and layer + 1 < layers
    ahead = ids if ahead is None else ahead
    gated = chosen.keep_mask is not None and chosen.cost is not None
    head = ids if outputs is None else outputs[:, predicted.head :]
    heads = outputs is not None and head.shape[1] > 0 and state.share > 0
    kernel_ids = torch.empty_like(ids)
    _claim[(1,)](
        ids, ids if chosen.keep_mask is None else chosen.keep_mask.view(torch.uint8),
        routing.costs if chosen.cost is None else chosen.cost,
        routing.rows, routing.ids, routing.costs, kernel_ids,
        head, ahead, state.records,
        state.slot_of, state.quick, state.slow, state.wait, state.best, state.best_wait, state.count, state.floors,
        state.free, state.scalars, state.prefetched, state.counters,
        loads.entries, loads.counts,
        layer, ids.numel(), experts if absent is None else absent, head.stride(0), head.shape[1],
        ahead.numel(), max_ahead, state.ahead_limit, *state.rates, state.share,
        LAYERS=layers, EXPERTS=experts,
        LAYER_BLOCK=max(16, triton.next_power_of_2(layers)), EXPERT_BLOCK=max(16, triton.next_power_of_2(experts)),
        PAIRS=max(16, triton.next_power_of_2(ids.numel())), TOP_K=ids.shape[1], ROWS=rows, WIDTH=width,
        AHEAD_PAIRS=max(16, triton.next_power_of_2(ahead.numel())), AHEAD_TOP_K=ahead.shape[1],
        GATED=gated, BY_DISTANCE=state.by_distance, HEADS=heads, AHEAD=prefetches,
        FLOORS=state.has_floors, MAX_LOADS=loads.max_loads, UNIT=UNIT, EVENT=EVENT,
        ROWS_AT_ONCE=ROWS_AT_ONCE, MIN_PROB=MIN_PROB, MAX_PROB=MAX_PROB, STEPS=int(STEPS),
        enable_fp_fusion=False,  # the chances of heads are rounded as the host rounds them
    )  # fmt: skip
    return kernel_ids
