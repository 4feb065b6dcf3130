"""Engines to measure with: probes, timing and losses. Never in a serving worker."""
