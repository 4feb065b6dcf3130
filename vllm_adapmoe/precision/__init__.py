"""Expert weights in fewer bits: rounding."""
