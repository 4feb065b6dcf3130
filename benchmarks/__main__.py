"""Runs `python -m benchmarks NAME`."""

from benchmarks.commands import app
from vllm_adapmoe.cli.app import run

run(app, "python -m benchmarks")
