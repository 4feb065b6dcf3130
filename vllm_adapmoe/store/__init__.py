"""Backing stores of experts: host memory or a packed file. One expert is one contiguous record."""
