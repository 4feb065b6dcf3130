"""The only package that imports vLLM: plugin entry points, and our layers, worker, scheduler and metrics."""
