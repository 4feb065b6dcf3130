"""Measures what gating, allocation and prefetch need to know of a model, and writes its ModelProfile."""
