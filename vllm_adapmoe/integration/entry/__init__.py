"""How vLLM finds the plugin, how it is switched on, and what is refused before a weight is read."""
