"""Side-by-side measurements of real engines."""
