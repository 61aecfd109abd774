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

FAST := not slow and not stack and not container
COMPOSE := docker compose
export EKIBEN_REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help up setup test test-slow test-heavy test-stack test-image browser stack-tools bench soak check format docs \
	sample lock clean image images stack-env stack-up stack-down backup restore

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

test: setup ## the tests, two files at a time, about 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(FAST)" --numprocesses 2 --dist loadfile

test-slow: setup ## the tests that train and serve the real model
	$(BIN)/python -m pytest -m "slow and not heavy"

test-heavy: setup ## a release killed at every step, swaps under a minute of load: on a machine that does nothing else
	$(BIN)/python -m pytest -m heavy

test-stack: setup ## the services of docker-compose.yml as processes, and what becomes of them; needs stack-tools
	$(BIN)/python -m pytest -m stack --capture=no tests/stack

test-image: setup ## build the images and run the whole line in them; needs podman or docker, and stack-tools
	$(BIN)/python -m pytest -m container

bench: setup ## Ekiben and its peers side by side, about 25 minutes of a quiet machine -> docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks

soak: setup ## ten minutes of all that clients and fate can do to a server, each answer checked
	$(BIN)/python -m tests.soak --minutes 10

browser: setup ## Chromium for the tests of the playground (Debian, Ubuntu), unless there is a browser
	@$(BIN)/python -m tests.browser 2>/dev/null || { \
		root=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$root apt-get update -qq && $$root apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; }

stack-tools: ## PostgreSQL and Prometheus for the tests of the stack (Debian, Ubuntu), unless they are there
	@PATH="$$PATH:$$(echo /usr/lib/postgresql/*/bin | tr ' ' :)"; \
	missing=$$(for tool in initdb:postgresql psql:postgresql-client prometheus:prometheus curl:curl wget:wget; do \
		command -v $${tool%%:*} >/dev/null || echo $${tool##*:}; done); \
	test -z "$$missing" || { \
		root=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$root apt-get update -qq && $$root apt-get install -qq -y --no-install-recommends $$missing; }

image: setup ## container image of the newest Bento -> ekiben-encoder
	$(BIN)/python deployments/images/build.py encoder

images: setup ## the images of the encoder, the training line and MLflow
	$(BIN)/python deployments/images/build.py encoder line mlflow

stack-env: ## write the secrets that docker-compose.yml asks for into .env; what is there stays
	$(PYTHON) deployments/stack_env.py

stack-up: setup stack-env ## the whole line on this server, by docker compose; its first model is the one of `make up`
	$(BIN)/ekiben up --no-serve
	$(BIN)/python deployments/images/build.py encoder line mlflow
	$(COMPOSE) up --detach
	$(COMPOSE) ps
	@echo "Prefect is at port 4200, MLflow at 5000, the encoder at 3000, Grafana at 3001, unless .env says otherwise."
	@echo "Names and passwords are in .env; docs/setup.md says what to try."

stack-down: ## stop the stack; what it has stored stays
	$(COMPOSE) down

backup: ## save the stack's databases and buckets: make backup TO=folder
	@test -n "$(TO)" || { echo "say where to: make backup TO=folder" >&2; exit 2; }
	$(PYTHON) deployments/backup.py save "$(TO)"

restore: ## bring them back into a new stack: make restore FROM=folder [FORCE=1]
	@test -n "$(FROM)" || { echo "say where from: make restore FROM=folder" >&2; exit 2; }
	$(PYTHON) deployments/backup.py restore "$(FROM)" $(if $(FORCE),--force)

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
