"""vLLM's workers with an expert cache, predictions in a step, and what a step reports."""
