"""Measures the statistics of a model that gating, allocation and prefetch need, and writes its ModelProfile."""
