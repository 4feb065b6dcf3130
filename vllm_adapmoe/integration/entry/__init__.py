"""Entry points of the plugin: registers it with vLLM, switches the method on, refuses what cannot work."""
