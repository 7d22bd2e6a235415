# Each target does its own set-up. ARGS is handed on, as in: make test ARGS="-k pool -x"
.DEFAULT_GOAL := help
ARGS ?=
PYTHON_BIN := .venv/bin/python
CONFIGS := istiod_lite.config netconfig.config waypoint.config ztunnel.config

.PHONY: help demo test check kube compile bench fmt docs manifests lock

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## the whole mesh on this machine, told step by step
	@.ci/setup demo
	@.venv/bin/ambit lab demo $(ARGS)

test: ## everything that this machine can run: format, lint, types, all tests
	@.ci/setup test
	@.ci/verify $(ARGS)

check: ## the inner loop, about a minute: format, lint, types, house, unit and shell tests
	@.ci/setup test
	@.ci/verify tests/house tests/unit tests/shell $(ARGS)

kube: ## build a kube-apiserver (once; needs Go) and run the tests that want one; or AMBIT_KUBECONFIG=FILE
	@.ci/setup test
	@test -n "$$AMBIT_KUBECONFIG" || tests/kube/build
	@$(PYTHON_BIN) -m pytest tests/kube $(ARGS)

compile: ## the data path as machine code, into .compiled/ (needs a C compiler); waypoints then use it
	@.ci/setup test
	@.ci/compile

bench: ## the numbers of docs/performance.md, of compiled modules where there is a C compiler
	@.ci/setup test
	@.ci/compile || true
	@for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(PYTHON_BIN) $$bench $(ARGS) || exit 1; done

fmt: ## format and sort imports
	@.ci/setup test
	@$(PYTHON_BIN) -m ruff check --quiet --fix --select I . ; $(PYTHON_BIN) -m ruff format .

docs: ## write docs/reference/config.md and cli.md from the classes and commands
	@.ci/setup test
	@$(PYTHON_BIN) -m mesh.runtime.config_docs $(CONFIGS) > docs/reference/config.md
	@$(PYTHON_BIN) -m mesh.cli.reference > docs/reference/cli.md

manifests: ## write manifests/ (rendered YAML and Helm chart) from mesh/cli
	@.ci/setup test
	@$(PYTHON_BIN) -m mesh.cli.chart manifests

lock: ## resolve the lock files anew (needs uv)
	@uv pip compile -q pyproject.toml --group build --universal --python-version 3.11 --generate-hashes --no-header -o requirements.lock
	@uv pip compile -q pyproject.toml --group build --group dev --universal --python-version 3.11 --generate-hashes --no-header -o requirements-dev.lock
