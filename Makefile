# Needs Python 3.11 to 3.13 with venv and pip; everything else is installed below .venv.
PYTHON ?= python3
VENV := .venv
UV := $(VENV)/bin/uv
DEV := $(VENV)/.installed
BENCH := $(VENV)/.installed-bench
export DAGSTER_HOME ?= $(CURDIR)/dagster_home

.PHONY: run dev test lint format screenshots bench-faults bench-speed clean

run: $(DEV) ## Analyse LIBRARY, or a sample library made for the purpose
	$(VENV)/bin/audio-assets analyze $(if $(LIBRARY),"$(LIBRARY)")

dev: $(DEV) ## Dagster's webserver and daemon on http://localhost:3000
	$(VENV)/bin/dagster dev --workspace workspace.yaml

test: $(DEV) ## Everything that CI tests
	$(VENV)/bin/pytest

lint: $(DEV) ## Style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(DEV)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

screenshots: $(DEV) ## Take the README's pictures anew
	$(VENV)/bin/python -m tests.browser.screenshots

bench-faults: $(BENCH) ## What faults cost, beside plain Dagster; LIBRARY as for run
	LIBRARY="$(LIBRARY)" $(VENV)/bin/python -m benchmarks.faults
	$(VENV)/bin/python -m benchmarks.report

bench-speed: $(BENCH) ## What the project costs, beside its bare algorithms and others
	LIBRARY="$(LIBRARY)" $(VENV)/bin/python -m benchmarks.speed
	$(VENV)/bin/python -m benchmarks.report

clean: ## Remove the environment; results in dagster_home stay
	rm -rf $(VENV)

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade uv

$(DEV): $(UV) pyproject.toml uv.lock
	UV_PROJECT_ENVIRONMENT=$(CURDIR)/$(VENV) $(UV) sync --frozen --inexact --quiet
	touch $@

$(BENCH): $(DEV)
	UV_PROJECT_ENVIRONMENT=$(CURDIR)/$(VENV) $(UV) sync --frozen --inexact --quiet --group bench
	touch $@
