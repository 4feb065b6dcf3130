"""Decisions about experts: eviction, residency, allocation, prefetch. They see ids, counts and costs, no tensors."""
