"""How much of a record is moved between two looks at what has become more urgent, or unwanted."""

TILE_BYTES = 1 << 20
"""Of a load that a layer waits for: big enough for a disk to be at its best."""
LEAST_TILE_BYTES = 1 << 16
SPECULATIVE_TILE_SECONDS = 0.25e-3
"""That demand waits at most for a tile of speculation, where the link's speed is known."""


def tile_bytes(bandwidth: float | None, urgent: bool) -> int:
    """Bytes of a tile.

    Args:
        bandwidth: of the link, bytes per second; None: not known.
        urgent: a layer waits for the load; nothing overtakes it.
    """
    if urgent or bandwidth is None:
        return TILE_BYTES
    blocks = int(bandwidth * SPECULATIVE_TILE_SECONDS) >> 12
    return min(max(blocks << 12, LEAST_TILE_BYTES), TILE_BYTES)
