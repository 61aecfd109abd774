# Ekiben: `make up` from a fresh clone to a served, answering API; `make test` to see that it holds.
# Linux without a GPU: `UV_TORCH_BACKEND=cpu make up` spares you several GB of CUDA libraries.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ekiben-setup
LOCK   := deployments/requirements.lock
UV     := $(BIN)/uv
UV_VERSION := 0.13.9
# The first interpreter that is 3.11 or newer; override with `make PYTHON=/path/to/python3.12 setup`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# uv does not read pip's configuration: hand on the folder of local wheels, when one is set there.
FIND_LINKS = $(shell links=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null); \
	test -n "$$links" && echo "--find-links $$links")
# CUDA libraries come with the CUDA build of torch, which pins them itself: in the lock they would follow the CPU build too.
CUDA := $(foreach p,cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 \
	nccl-cu13 nvjitlink nvshmem-cu13 nvtx,nvidia-$p) cuda-bindings cuda-pathfinder cuda-toolkit triton

.DEFAULT_GOAL := help
.PHONY: help up setup test test-slow test-heavy browser bench soak check format docs sample lock clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: setup ## sample data -> tuned, gated, packed model -> API on port 3000
	$(BIN)/ekiben up

setup: $(STAMP) ## build .venv with the locked packages (quick when nothing changed)

$(STAMP): pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "Ekiben needs Python 3.11 or newer; none was found. Install one, or: make PYTHON=/path/to/python setup" >&2; exit 1; }
	@echo "[setup] $(PYTHON) -> $(VENV), packages of $(LOCK)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	@$(UV) pip install --python $(BIN)/python $(FIND_LINKS) --requirement $(LOCK)
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

test: setup ## the tests, about 14 minutes on 2 cores
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup ## the tests that train and serve the real model
	$(BIN)/python -m pytest -m "slow and not heavy"

test-heavy: setup ## a release killed at every step, swaps under a minute of load: on a machine that does nothing else
	$(BIN)/python -m pytest -m heavy

bench: setup ## Ekiben and its peers side by side, about 25 minutes of a quiet machine -> docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks

soak: setup ## ten minutes of all that clients and fate can do to a server, each answer checked
	$(BIN)/python -m tests.soak --minutes 10

browser: setup ## Chromium for the tests of the playground (Debian, Ubuntu), unless there is a browser
	@$(BIN)/python -m tests.browser 2>/dev/null || { \
		root=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$root apt-get update -qq && $$root apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; }

check: setup ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write the generated pages of docs/ again
	$(BIN)/python -m flows.reference

sample: setup ## make the sample data again (byte for byte the same)
	cd data && ../$(BIN)/dvc repro --force

lock: setup ## resolve the lock again from pyproject.toml
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --quiet --no-emit-package ekiben \
		$(addprefix --no-emit-package ,$(CUDA)) --custom-compile-command "make lock" --output-file $(LOCK)

clean: ## remove the environment and the caches, but no state (.ekiben)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
