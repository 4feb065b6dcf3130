"""vLLM's schedulers with knowledge of the expert cache, and the metrics in the front end."""
