"""Scheduling policies: which requests to run in a step, given the cache's resident experts. No clocks, no engine."""
