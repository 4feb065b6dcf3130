"""Predictions of the experts that each request's next token uses: next-token heads and their per-request state."""
