"""The expert cache: pools of slots, transfers into them, and the manager that owns both."""
