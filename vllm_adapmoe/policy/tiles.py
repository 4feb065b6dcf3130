"""Tile sizes: bytes of a record moved between two checks for cancellation and for more urgent loads."""

TILE_BYTES = 1 << 20
"""Minimum tile of a speculative read, which demand reads preempt; a sixteenth of a bigger record. Two such reads at a
time get 0.90 to 1.01 of a plain sequential read, one gets 0.77 to 0.91 (examples/benchmarks/transfer.json)."""
DEMAND_TILE_BYTES = 16 << 20
"""Tile of a demand read, which is never preempted. The disk idles between two tiles: relative to a plain sequential
read of 48 MiB, one reader gets 0.6 to 0.8 with tiles of 1 MiB, 0.96 with these (`python -m benchmarks transfer`)."""
MIN_TILE_BYTES = 1 << 16
"""Minimum tile of a speculative load over a link of known speed."""
SPECULATIVE_TILE_SECONDS = 0.25e-3
"""Maximum time a demand load waits for a speculative tile, where the link's speed is known."""


def tile_bytes(record_bytes: int, urgent: bool, bandwidth: float | None) -> int:
    """Returns the bytes of a tile.

    Args:
        record_bytes: size of the expert's record.
        urgent: a layer waits for the load, which is never preempted.
        bandwidth: bandwidth of a link that several records share tile by tile, bytes per second; None: no limit.
    """
    if bandwidth is None:
        return DEMAND_TILE_BYTES if urgent else max(TILE_BYTES, _whole_blocks(record_bytes // 16))
    if urgent:
        return TILE_BYTES
    return min(max(_whole_blocks(int(bandwidth * SPECULATIVE_TILE_SECONDS)), MIN_TILE_BYTES), TILE_BYTES)


def _whole_blocks(nbytes: int) -> int:
    """Rounds down to whole blocks of 4096 bytes, as direct I/O requires."""
    return nbytes // 4096 * 4096
