# Two commands do everything from a fresh clone: `make demo` and `make test`. Both make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
# One more than cores: a third of the tests' seconds are waits, of clients for servers and of parents for children.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, 1 + (os.cpu_count() or 1)))')

.PHONY: demo test test-all test-gpu test-versions lint docs real clean

.venv/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("ctpipe needs Python 3.11, 3.12 or 3.13; this is " + sys.version.split()[0] + ". Run make PYTHON=python3.12") if not (3, 11) <= sys.version_info < (3, 14) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,all,bench]'
	touch $@

demo: .venv/.run
	$(BIN)/ctpipe demo demo-out

test: .venv/.dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not real" --durations=25

real: .venv/.dev
	$(BIN)/python -m pytest -m "real and not slow" --durations=10

test-gpu: .venv/.dev
	$(BIN)/python -m pytest -m cuda -rs

test-all: .venv/.dev
	$(BIN)/python -m pytest
	$(BIN)/python tests/fuzz/fuzz_reading.py --seconds 600

# Every supported Python that is here, lowest and newest dependencies.
test-versions: .venv/.dev
	bash .ci/versions all

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file infra/mypy.ini
	$(BIN)/lint-imports

# The site, without a network; a broken link, a name that is gone or a docstring that contradicts its code fails it.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file infra/mkdocs.yml

clean:
	rm -rf .venv demo-out dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
