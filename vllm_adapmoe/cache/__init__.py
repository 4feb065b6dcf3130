"""Slots, who leaves them, and the manager that owns them."""
