"""Cache policies: eviction, residency, allocation, prefetch. They work on ids, counts and costs, never on tensors."""
