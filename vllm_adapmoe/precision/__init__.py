"""Expert weights in fewer bits: rounding, and the sizes of the rounded formats."""
