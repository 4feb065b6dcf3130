"""Plans memory: from a budget to slots and tokens per second."""
