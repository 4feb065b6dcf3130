"""Checks that a store in host memory fits before it is filled: a container that exceeds its memory limit is killed."""

from collections.abc import Sequence

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.planning.slot_budget import DeviceMemory, ExpertShape, bytes_of
from vllm_adapmoe.store.host_memory import HostMemory, host_memory
from vllm_adapmoe.units import GiB

LAYERS_AT_ONCE = 2
"""Layers in memory in addition to the records: one as loaded, and one in the kernel's format."""


def check_host_room(
    shapes: Sequence[ExpertShape], layer_bytes: int, slots: Sequence[int], other_memory: DeviceMemory | None, ranks: int
) -> None:
    """Checks that a host store fits into the available host memory.

    Args:
        shapes: shapes of this rank's experts, by pool.
        layer_bytes: bytes of the experts of the largest layer.
        slots: number of slots of each pool.
        others: this rank's other memory, if that and the slots are in host memory, too (on the CPU); else None.
        ranks: number of ranks on this machine, each needing the same.

    Raises:
        AdapMoEError: it does not fit; lists what is needed for what, and what is available.
    """
    parts = {
        "experts": bytes_of(shapes, [shape.num_experts for shape in shapes]),
        f"{LAYERS_AT_ONCE} layers while they load": LAYERS_AT_ONCE * layer_bytes,
    }
    if other_memory is not None:
        parts["slots"] = bytes_of(shapes, slots)
        parts["other weights, KV cache and activations"] = (
            other_memory.other_weights + other_memory.kv_cache + other_memory.activations
        )
    needed, memory = sum(parts.values()) * ranks, host_memory()
    if needed > memory.available:
        raise AdapMoEError(refusal(parts, ranks, needed, memory))


def check_tier_room(host_gb: float, expert_bytes: int, ranks: int) -> int:
    """Checks that a host tier fits into the available host memory; returns its bytes, at most those of all experts.

    Args:
        host_gb: GiB that the user gives each rank.
        expert_bytes: bytes of this rank's experts.
        ranks: number of ranks on this machine, each needing the same.

    Raises:
        AdapMoEError: it does not fit.
    """
    nbytes, memory = min(int(host_gb * GiB), expert_bytes), host_memory()
    if nbytes * ranks > memory.available:
        times = f" on each of {ranks} ranks" if ranks > 1 else ""
        raise AdapMoEError(
            f"host_gb={host_gb} needs {nbytes / GiB:.2f} GiB of host memory{times}; {memory.available / GiB:.2f} GiB "
            f"are available, limited by {memory.limited_by}; set at most "
            f"host_gb={memory.available // ranks * 100 // GiB / 100:.2f}"
        )
    return nbytes


def refusal(parts: dict[str, int], ranks: int, needed: int, memory: HostMemory) -> str:
    """Returns the error line for the user."""
    listed = " + ".join(f"{nbytes / GiB:.2f} for {part}" for part, nbytes in parts.items() if nbytes)
    times = f" on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"store=host needs {needed} bytes ({needed / GiB:.2f} GiB) of host memory, {listed}{times}; "
        f"{memory.available} bytes ({memory.available / GiB:.2f} GiB) are available, limited by {memory.limited_by}; "
        "use store=file"
    )
