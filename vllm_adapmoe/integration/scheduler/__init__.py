"""Schedulers that take the expert cache into account, and the metrics in the front end."""
