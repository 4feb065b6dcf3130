"""Adaptive top-k: drops some of the experts that the router selected for a token."""
