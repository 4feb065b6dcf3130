"""Backing copies of experts: in host memory, or in a packed file. One expert is one contiguous record."""
