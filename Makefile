# Everything a newcomer or CI needs. `make help` lists the targets; every one of them sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.milonga-ready
PARITY := .venv-parity
# The first interpreter that runs and is of a supported version (a pyenv shim may exist and not run).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
	&& echo $$p && break; done)
UV_VERSION := 0.13.8
BUF_VERSION := 1.75.0
TORCH := torch==2.13.0
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Half a gigabyte instead of three where no NVIDIA driver answers. `make setup TORCH_INDEX=` takes PyPI's build.
TORCH_INDEX ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo $(CPU_TORCH_INDEX))
EXPORT := $(BIN)/uv export --quiet --frozen --extra dev --no-hashes --no-emit-project
PYTEST_ARGS ?=

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Make .venv with everything, at the locked versions (CPU build of torch without an NVIDIA driver)

# torch comes first and by itself, since one lock can't hold both of its builds. The rest is the lock's: what is
# needed without torch, and under the lock's constraints what the chosen build of torch needs.
$(READY): pyproject.toml uv.lock hatch_build.py
	@test -n "$(PYTHON)" || { echo "milonga needs Python 3.11, 3.12 or 3.13 on the PATH (or: make PYTHON=/path/to/python)"; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON), $(TORCH) from $(or $(TORCH_INDEX),PyPI) — a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --retries 1 --no-deps $(TORCH) $(addprefix --extra-index-url ,$(TORCH_INDEX))
	$(EXPORT) -o $(VENV)/constraints.txt
	$(EXPORT) --prune torch -o $(VENV)/requirements.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c $(VENV)/constraints.txt -r $(VENV)/requirements.txt $(TORCH)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@
	@echo "ready: $(BIN)/milonga --help"

.PHONY: protos
protos: $(READY) ## Generate the gRPC stubs under protos/milonga (nothing to do where they are up to date)
	@$(BIN)/python protos/generate.py

.PHONY: check
check: lint-python lint-types lint-imports lint-protos ## Everything CI checks: format, lint, types, import rules, protos

.PHONY: lint-python
lint-python: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.PHONY: lint-types
lint-types: protos
	$(BIN)/mypy

.PHONY: lint-imports
lint-imports: protos
	$(BIN)/lint-imports

.PHONY: lint-protos
lint-protos:
	@if command -v npm >/dev/null; then \
	  test -x $(VENV)/buf/node_modules/.bin/buf || npm install --silent --no-save --prefix $(VENV)/buf @bufbuild/buf@$(BUF_VERSION); \
	  echo "buf lint protos"; $(VENV)/buf/node_modules/.bin/buf lint protos; \
	else \
	  echo "NOT CHECKED: buf lint needs npm, which is not installed (Node.js 20 or later brings it)"; \
	  test -z "$${CI:-}"; \
	fi

.PHONY: format
format: $(READY) ## Format the Python files and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: test
test: protos ## Run the tests (PYTEST_ARGS="-k engine" for some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: demo
demo: protos ## Start the service, send it three prompts over gRPC, write clips and a page to listen to
	@$(BIN)/python examples/demo.py

.PHONY: bench
bench: protos ## Measure the engine and the service on this machine (ratios in one run)
	for program in benchmarks/*.py; do $(BIN)/python $$program; done

.PHONY: parity
parity: $(PARITY)/.milonga-ready ## Compare our CLAP with laion_clap, which needs numpy < 2 and so .venv-parity
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PARITY)/bin/python -m pytest tests/parity -q -W ignore $(PYTEST_ARGS)

# The lock's versions: of the extra laion-clap, and where that says nothing (torch's own needs, pytest) of dev.
$(PARITY)/.milonga-ready: $(READY)
	@echo "setting up $(PARITY) with $(PYTHON), $(TORCH) for CPUs — a minute or two the first time"
	@$(PYTHON) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install -qq --disable-pip-version-check --retries 1 --no-deps $(TORCH) --extra-index-url $(CPU_TORCH_INDEX)
	@$(BIN)/uv export --quiet --frozen --extra laion-clap --no-hashes --no-emit-project --no-annotate --prune torch -o $(PARITY)/requirements.txt
	@awk -F'==' 'NR == FNR { known[$$1]; next } !($$1 in known)' $(PARITY)/requirements.txt $(VENV)/constraints.txt > $(PARITY)/constraints.txt
	@$(BIN)/uv pip install --quiet --python $(PARITY)/bin/python -c $(PARITY)/constraints.txt -r $(PARITY)/requirements.txt $(TORCH) diffusers pytest pytest-asyncio
	@touch $@

.PHONY: mini
mini: protos ## Train the embedded model family from scratch (hours; resumable)
	$(BIN)/python -m training.mini

.PHONY: clean
clean: ## Remove what was made, except .venv and training runs under build/mini
	rm -rf dist build/demo build/bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f protos/.generated protos/milonga/v1/*_pb2*.py protos/milonga/v1/*_pb2*.pyi
	find services training tests protos examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
