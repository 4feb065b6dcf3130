"""One command that checks the device path on a machine with a GPU: `python -m benchmarks.gpu_check`.

Needs torch, Triton and numpy, and uses vLLM where it is installed. Everything runs on the CPU too, at tiny shapes and
in Triton's interpreter, so that the check itself is tested without a GPU.
"""
