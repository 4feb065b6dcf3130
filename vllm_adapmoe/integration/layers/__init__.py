"""Routed experts in the expert cache: replacements of vLLM's layers."""
