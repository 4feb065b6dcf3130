"""How much of a record is moved between two looks at what has become more urgent, or unwanted."""

TILE_BYTES = 1 << 20
DEMAND_TILE_BYTES = 16 << 20
"""Of a read that nothing overtakes. Between two tiles the disk waits for its reader: of what a plain sequential read of
48 MiB gets, one reader gets 0.6 to 0.8 with tiles of 1 MiB, 0.96 with these (`python -m benchmarks transfer`)."""
LEAST_TILE_BYTES = 1 << 16
SPECULATIVE_TILE_SECONDS = 0.25e-3
"""That demand waits at most for a tile of speculation, where the link's speed is known."""


def tile_bytes(record_bytes: int, urgent: bool, bandwidth: float | None) -> int:
    """Bytes of a tile.

    Args:
        record_bytes: of the expert.
        urgent: a layer waits for the load; nothing overtakes it.
        bandwidth: of a link that several records share tile by tile, bytes per second; None: as fast as it goes.
    """
    if bandwidth is None:
        return DEMAND_TILE_BYTES if urgent else max(TILE_BYTES, _whole_blocks(record_bytes // 16))
    if urgent:
        return TILE_BYTES
    return min(max(_whole_blocks(int(bandwidth * SPECULATIVE_TILE_SECONDS)), LEAST_TILE_BYTES), TILE_BYTES)


def _whole_blocks(nbytes: int) -> int:
    """What direct I/O can read."""
    return nbytes // 4096 * 4096
