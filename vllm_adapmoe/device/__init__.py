"""Kernels of our own, in Triton."""

MAX_TOKENS = 64
"""Of one call of `experts_by_address`: all tokens of an expert are rows of one tile."""
ALIGNMENT = 16
"""Of the addresses that it is given, bytes: what one load of the device reads."""
