# Everything a clone needs. `make` alone lists it.
#
# PYTHON=python3.12 chooses the interpreter that makes .venv; otherwise the first
# one that runs is taken. 3.11 and 3.12 come first: the embedded servers' wheels
# exist for them.

MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
DATA_DIR := $(or $(TASKQUEUE_DATA_DIR),.taskqueue)
PYTEST_ARGS ?=
IMAGE ?= taskqueue:dev
BUILDER ?= docker
DEMO_ARGS ?=
SLOW := $(addprefix tests/integration/,test_upgrade.py test_scale.py test_disk_use.py test_benchmarks.py worker/test_metrics.py)
BENCH_ARGS ?=
API_ARGS ?=

# A candidate is run, not looked up: a pyenv shim may be there and fail.
CANDIDATES := $(or $(PYTHON),python3.12 python3.11 python3 python3.13)
FIND_PYTHON = for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "$$candidate"; break; \
	  fi; \
	done

##@ Everyday

.PHONY: run
run: $(VENV)/.embedded ## Run everything here; Ctrl-C ends it. PORT and TASKQUEUE_DATA_DIR may be set
	@exec $(BIN)/taskqueue dev

.PHONY: test
test: $(VENV)/.dev ## Run every test that needs no cluster
	@exec $(BIN)/python -m pytest -n auto --dist loadscope --max-worker-restart 0 $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: $(VENV)/.dev ## Run every fault and all that is slow, one after another; FAULTS_SEED repeats a run
	@exec $(BIN)/python -m pytest tests/faults $(SLOW) -p no:xdist -p no:randomly -m "" $(PYTEST_ARGS)

.PHONY: soak
soak: $(VENV)/.dev ## Random faults under load for MINUTES (20), then an audit; SOAK_ARGS="--seed N" repeats one
	@exec $(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),20) $(SOAK_ARGS)

.PHONY: test-api
test-api: $(VENV)/.dev ## Try the API against its own description with schemathesis; API_ARGS="--url … --key …"
	@exec $(BIN)/python -m tests.conformance $(API_ARGS)

.PHONY: check
check: $(VENV)/.dev ## Lint, formatting, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/.dev ## Format the code, and repair what can be repaired safely
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

.PHONY: openapi
openapi: $(VENV)/.dev ## Write docs/openapi.json anew: the API without sample tasks and tasks of your own
	@env TASKQUEUE_SAMPLE_TASKS=false TASKQUEUE_TASK_MODULES= $(BIN)/taskqueue openapi > docs/openapi.json

.PHONY: metrics
metrics: $(VENV)/.dev ## Write docs/metrics.md anew, from the catalogue
	@$(BIN)/python -m app.core.metrics.page > docs/metrics.md

.PHONY: dashboards
dashboards: $(VENV)/.dev ## Write Grafana's dashboards anew, charts/taskqueue/dashboards
	@exec $(BIN)/python -m k8s.observability

.PHONY: observe
observe: $(VENV)/.dev ## Watch `make run` with a real Prometheus (on PATH), rules and alerts included; PROMETHEUS_PORT
	@exec $(BIN)/python -m k8s.observability.prometheus

.PHONY: demo-faults
demo-faults: $(VENV)/.embedded ## Kill everything under 500 tasks, and count what was lost
	@exec $(BIN)/python -m app.dev.demo_faults $(DEMO_ARGS)

.PHONY: bench
bench: $(VENV)/.bench ## Measure all against the peers and the limits, and write docs/performance.md; BENCH_ARGS="--only submit"
	@exec $(BIN)/python -m benchmarks.suite --record $(BENCH_ARGS)

.PHONY: bench-quick
bench-quick: $(VENV)/.bench ## The same in three minutes at most: short rounds, and three of them
	@exec $(BIN)/python -m benchmarks.suite --quick $(BENCH_ARGS)

.PHONY: bench-backlog
bench-backlog: $(VENV)/.dev ## Measure what a million waiting rows cost; BENCH_ARGS="--explain" shows the plans
	@exec $(BIN)/python -m benchmarks.backlog $(BENCH_ARGS)

.PHONY: bench-listing
bench-listing: $(VENV)/.dev ## Measure what finding tasks costs among a million, filter by filter
	@exec $(BIN)/python -m benchmarks.listing $(BENCH_ARGS)

.PHONY: bench-webhooks
bench-webhooks: $(VENV)/.dev ## Measure one relay's webhooks a second against a bare httpx client
	@exec $(BIN)/python -m benchmarks.webhooks $(BENCH_ARGS)

.PHONY: bench-fairness
bench-fairness: $(VENV)/.dev ## Measure whether a receiver that never answers slows a thousand others
	@exec $(BIN)/python -m benchmarks.fairness $(BENCH_ARGS)

.PHONY: bench-waiting
bench-waiting: $(VENV)/.dev ## Measure how soon a long poll is answered, and what a thousand of them cost
	@exec $(BIN)/python -m benchmarks.waiting $(BENCH_ARGS)

.PHONY: bench-metrics
bench-metrics: $(VENV)/.dev ## Measure what the metrics cost a submit and a worker, and a look at them
	@exec $(BIN)/python -m benchmarks.metrics $(BENCH_ARGS)

.PHONY: bench-tracing
bench-tracing: $(VENV)/.dev ## Measure what traces cost a submit and a task, by how many are sampled
	@exec $(BIN)/python -m benchmarks.tracing $(BENCH_ARGS)

##@ Kubernetes

.PHONY: image
image: ## Build the image IMAGE (taskqueue:dev) with BUILDER (docker, podman, buildah)
	@$(BUILDER) build --tag $(IMAGE) --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null) .

.PHONY: test-chart
test-chart: $(VENV)/.dev ## Render the chart with helm, and look at what comes out
	@exec $(BIN)/python -m pytest tests/charts $(PYTEST_ARGS)

.PHONY: k8s
k8s: $(VENV)/.dev ## Write k8s/base and k8s/keda, and the README of the chart, anew
	@$(BIN)/python -m tests.charts.plain
	@cd charts/taskqueue && helm-docs --log-level warning --chart-search-root . --chart-to-generate . \
	  || echo "helm-docs is not there: the README of the chart stays as it is"

.PHONY: test-e2e
test-e2e: $(VENV)/.dev ## Install IMAGE with the chart on the cluster of KUBECONFIG, and use it
	@E2E_IMAGE=$(IMAGE) exec $(BIN)/python -m pytest tests/e2e -p no:randomly $(PYTEST_ARGS)

##@ Rarely

.PHONY: clean
clean: ## Remove the data of the embedded servers, and caches; refuses while they run
	@if [ -e "$(DATA_DIR)/lock" ]; then \
	  python=$$($(FIND_PYTHON)); \
	  "$$python" -c 'import fcntl, sys; fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)' \
	    "$(DATA_DIR)/lock" 2>/dev/null \
	  || { echo "make clean: $(DATA_DIR) is in use: stop the running service first" >&2; exit 1; }; \
	fi
	@rm -rf -- "$(DATA_DIR)" .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

.PHONY: requirements
requirements: $(VENV)/.python ## Compile the hash-pinned requirement files anew
	@echo "Compiling requirements/*.txt ..."
	@tools=$$(mktemp -d) && trap 'rm -rf "$$tools"' EXIT && $(BIN)/python -m venv "$$tools" \
	&& "$$tools/bin/pip" install --quiet --disable-pip-version-check uv \
	&& compile() { file=$$1; shift; "$$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 \
	     --prerelease if-necessary-or-explicit --generate-hashes --no-header --no-annotate \
	     --no-emit-index-url --no-emit-find-links "$$@" --output-file "$$file"; } \
	&& compile requirements/image.txt pyproject.toml \
	&& compile requirements/embedded.txt pyproject.toml --extra embedded \
	&& compile requirements/dev.txt pyproject.toml --extra embedded --extra dev \
	&& compile requirements/bench.txt --group pyproject.toml:bench

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The virtual environment. Its stamps say what is in it: .python (itself), .embedded (what `make run`
# needs), .dev (that and the tools). One environment serves both and only grows, so nothing that is
# there is installed again, and nothing that is used is taken away.

$(VENV)/.python:
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or newer among: $(CANDIDATES). Install one, or set PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "make: $$python lacks venv or ensurepip. Install them (Debian: python3-venv), or set PYTHON" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$python" --version) ..."; \
	"$$python" -m venv $(VENV)
	@touch $@

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

$(VENV)/.embedded: $(VENV)/.python requirements/embedded.txt pyproject.toml
	@if [ ! -e $(VENV)/.dev ] || [ requirements/dev.txt -nt $(VENV)/.dev ] || [ pyproject.toml -nt $(VENV)/.dev ]; then \
	  if [ -e $(VENV)/.dev ]; then $(MAKE) $(VENV)/.dev; else \
	    echo "Installing requirements/embedded.txt ..." \
	    && $(INSTALL) --require-hashes -r requirements/embedded.txt \
	    && $(INSTALL) --no-build-isolation --no-deps -e .; \
	  fi; \
	fi
	@touch $@

$(VENV)/.dev: $(VENV)/.python requirements/dev.txt pyproject.toml
	@echo "Installing requirements/dev.txt ..."
	@$(INSTALL) --require-hashes -r requirements/dev.txt
	@$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

# The peers of the benchmarks have an environment inside: some want another Redis client than ours, and one
# brings a parser that ours would use as well. Without them the rest is still measured.
$(VENV)/.bench: $(VENV)/.dev requirements/bench.txt
	@echo "Installing requirements/bench.txt ..."
	@if $(BIN)/python -m venv $(VENV)/peers \
	  && $(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
	    -r requirements/bench.txt; then touch $@; \
	else rm -rf $(VENV)/peers; echo "The peers can't be had: they are left out"; fi
