"""Cache-aware schedulers, and the metrics in the front end."""
