"""CacheStats: the counters of an expert cache."""

from dataclasses import dataclass


@dataclass
class CacheStats:
    """Cache counters since the engine started; each event counts its distinct experts."""

    hits: int = 0
    """Experts that were resident or staged when their layer requested them."""
    misses: int = 0
    """Experts that were neither resident nor staged: loaded on demand, or late."""
    late: int = 0
    """Misses whose prefetch was in flight when the layer requested them."""
    prefetches: int = 0
    """Prefetches started."""
    prefetch_hits: int = 0
    """Hits on experts that a prefetch had loaded, for this event or an earlier one."""
    prefetches_wasted: int = 0
    """Prefetches completed, but evicted before a layer requested the expert."""
    prefetches_cancelled: int = 0
    """Prefetches cancelled in flight because the router did not select the expert."""
    fetched_bytes: int = 0
    """Bytes transferred, on demand or speculatively."""
    host_hits: int = 0
    """Fetches of records that the host memory of `host_gb` held."""
    host_misses: int = 0
    """Fetches of records that it did not hold, which were read from the packed file."""
    wasted_bytes: int = 0
    """Bytes of loads cancelled or failed, and of prefetches evicted before a layer requested the expert."""
    stall_seconds: float = 0.0
    """Seconds that layers waited for experts, on the host or on the device; in steps that a GPU decides, the seconds
    that the host's fetches have taken for as many bytes."""
    fetch_seconds: float = 0.0
    """Seconds with at least one transfer in flight: `fetched_bytes / fetch_seconds` is the bandwidth achieved. On a GPU
    at least that: the seconds of demand loads are added, though prefetches may be in flight meanwhile."""

    @property
    def demand_loads(self) -> int:
        """Experts loaded because a layer requested them."""
        return self.misses - self.late
