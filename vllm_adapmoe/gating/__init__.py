"""Adaptive top-k: how many of the experts that the router chose a token keeps."""
