"""Expert offloading and adaptive gating for vLLM: serves mixture-of-experts models larger than device memory."""

__version__ = "0.1.0"
