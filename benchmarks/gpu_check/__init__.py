"""Checks the device path on a machine with a GPU with one command: `python -m benchmarks.gpu_check`.

It needs torch, Triton and numpy, and uses vLLM if installed. Everything also runs on the CPU, at tiny shapes and in
Triton's interpreter, so that the check itself is tested without a GPU.
"""
