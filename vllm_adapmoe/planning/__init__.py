"""From a memory budget to slots and tokens per second."""
