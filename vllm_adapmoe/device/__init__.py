"""Decoding with experts read in place: Triton kernels, address tables and deferred routing."""

MAX_TOKENS = 64
"""Maximum tokens of one call of `experts_by_address`: all tokens of an expert are rows of one tile."""
ALIGNMENT = 16
"""Alignment in bytes of the addresses passed to it: the width of one vector load."""
