"""Which requests a step should hold, given what the expert cache holds: pure policy, without clocks and engines."""
