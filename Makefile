# make demo       build the MAC recipe and try it on this repository's README
# make test       the everyday suite            make test-slow   the long tests
# make check      ruff and mypy                 make clean       remove .venv and what was built
# PYTHON=python3.12 make ...    picks the interpreter that .venv is made from (3.10 or newer)

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet --quiet
SETTINGS := pyproject.toml constraints.txt
# one thread for each of pytest's workers: more of them than cores makes small tensors many times slower
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

.PHONY: demo test test-slow check clean

demo: .venv/.installed
	.venv/bin/titans-build mac --try README.md

test: .venv/.installed-dev
	$(PYTEST)

test-slow: .venv/.installed-dev
	$(PYTEST) -m slow

# mypy reads the package as it is installed, so it gets a plain copy of its own rather than the editable one
check: .venv/.installed-dev
	.venv/bin/ruff check .
	rm -rf build .venv/typecheck
	$(PIP) install --no-deps --no-build-isolation --upgrade --target .venv/typecheck .
	cd .venv/typecheck && ../bin/mypy -p titans_build --cache-dir ../mypy_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "titans-build needs Python 3.10 or newer: PYTHON=/path/to/python3 make ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python $(SETTINGS)
	$(PIP) install --editable . --constraint constraints.txt
	@touch $@

.venv/.installed-dev: .venv/bin/python $(SETTINGS)
	$(PIP) install --editable ".[dev]" --constraint constraints.txt
	@touch $@ .venv/.installed

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
