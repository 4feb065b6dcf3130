"""Expert cache and adaptive gating for vLLM: serve mixture-of-experts models that are bigger than the device."""

__version__ = "0.1.0"
