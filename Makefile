# Needs Python 3.11 to 3.13 with venv and pip; everything else is installed below .venv.
PYTHON ?= python3
VENV := .venv
UV := $(VENV)/bin/uv
DEV := $(VENV)/.installed
BENCH := $(VENV)/.installed-bench
PYTHONS := 3.11 3.12 3.13
# Each run starts a dozen processes, which without bytecode would compile what they import, for seconds.
unexport PYTHONDONTWRITEBYTECODE
export DAGSTER_HOME ?= $(CURDIR)/dagster_home

PYTHON_TESTS := $(PYTHONS:%=test-python-%)

.PHONY: run dev test test-pythons dist fuzz $(PYTHON_TESTS) lint format screenshots bench-accuracy bench-faults bench-speed clean

run: $(DEV) ## Analyse LIBRARY, or a sample library made for the purpose
	$(VENV)/bin/audio-assets analyze $(if $(LIBRARY),"$(LIBRARY)") || [ $$? -eq 3 ] # 3: some files failed

dev: $(DEV) ## Dagster on http://localhost:3000, pages and metrics on http://localhost:3001
	$(VENV)/bin/audio-assets prepare
	umask $${AUDIO_ASSETS_UMASK:-077} && { $(VENV)/bin/audio-assets serve & } && \
	    trap "kill $$! 2>/dev/null" EXIT INT TERM && $(VENV)/bin/dagster dev --workspace workspace.yaml

test: $(DEV) ## All tests, those of a file after one another
	$(VENV)/bin/pytest --numprocesses $$(($$(nproc) < 4 ? $$(nproc) + 1 : 4)) --dist loadfile \
	    --no-loadscope-reorder

test-pythons: $(PYTHON_TESTS) ## The installed wheel on each promised Python that can be found here

# uv passes over what is called python3.12 and does not run, as pyenv's may; what pyenv has installed
# need not be on the PATH.
$(PYTHON_TESTS): test-python-%: dist
	@if $(VENV)/bin/python -V | grep -q ' $*\.'; then \
	    echo 'Python $*: has all tests, in make test'; exit; \
	fi; \
	for bin in "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$*.*/bin; do PATH=$$PATH:$$bin; done; \
	python=$$($(UV) python find --system --no-project --no-python-downloads $* 2>/dev/null) || { \
	    echo 'Python $*: SKIPPED, it cannot be found here'; exit; \
	}; \
	echo "Python $*: $$python"; \
	tests/installed_wheel.sh "$$python" $(CURDIR)/$(VENV)-$*

dist: $(DEV) ## The wheel and the source distribution, in dist/
	$(UV) build --quiet --clear

fuzz: $(DEV) ## Damaged files, settings and odd names for half an hour
	AUDIO_TEST_FUZZ_SECONDS=1500 AUDIO_TEST_FUZZ_SEED=$$(date +%s) $(VENV)/bin/pytest -s tests/test_fuzz.py

lint: $(DEV) ## Style and types, and that uv.lock is that of pyproject.toml
	$(UV) lock --check --quiet
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
	LIBRARY="$(LIBRARY)" $(VENV)/bin/python -m benchmarks.damage
	$(VENV)/bin/python -m benchmarks.report

bench-speed: $(BENCH) ## What the project costs, beside its extractors alone and others
	LIBRARY="$(LIBRARY)" $(VENV)/bin/python -m benchmarks.speed
	LIBRARY="$(LIBRARY)" $(VENV)/bin/python -m benchmarks.drift
	$(VENV)/bin/python -m benchmarks.report

bench-accuracy: $(BENCH) ## How right the values are; ANNOTATIONS names a collection of your own
	$(VENV)/bin/python -m benchmarks.accuracy $(if $(ANNOTATIONS),--annotations "$(ANNOTATIONS)")
	$(VENV)/bin/python -m benchmarks.tempo_calibration
	$(VENV)/bin/python -m benchmarks.report

clean: ## Remove the environments; results in dagster_home stay
	rm -rf $(VENV) $(PYTHONS:%=$(VENV)-%) dist

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade uv

# As parts of librosa are first imported, Numba compiles them and keeps the code. Processes that do so
# at once leave code that crashes all later ones (github.com/numba/numba/issues/10128).
$(DEV): $(UV) pyproject.toml uv.lock
	UV_PROJECT_ENVIRONMENT=$(CURDIR)/$(VENV) $(UV) sync --frozen --inexact --quiet
	$(VENV)/bin/python -c 'import audio_assets.features.kernels, librosa.beat, librosa.feature'
	touch $@

$(BENCH): $(DEV)
	UV_PROJECT_ENVIRONMENT=$(CURDIR)/$(VENV) $(UV) sync --frozen --inexact --quiet --group bench
	touch $@
