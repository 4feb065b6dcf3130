"""Measures engines: probes, timing and losses. Not used while serving."""
