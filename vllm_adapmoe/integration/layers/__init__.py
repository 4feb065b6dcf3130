"""Replacements of vLLM's MoE layers, whose routed experts are in the expert cache."""
