"""Decode steps that the GPU decides: Triton kernels, residency on the device, routing that the host reads later."""

MAX_TOKENS = 64
"""Maximum tokens of a step that the GPU decides: those beyond are few, and are prompts rather than decode steps."""
MAX_TOP_K = 16
"""Maximum experts per token: the pairs of a step are a block of at most 1024 in `claim`."""
MAX_EXPERTS = 512
"""Maximum experts of a layer: each is one number of a block in `claim`."""
