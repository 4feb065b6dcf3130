"""vLLM's workers with an expert cache: predictions during a step, and reports after it."""
