"""Kernels of our own, in Triton."""

MAX_TOKENS = 64
"""Of one call of `experts_by_address`: all tokens of an expert are rows of one tile."""
