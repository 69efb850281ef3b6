# make demo       build the MAC recipe and try it on this repository's README
# make test       the everyday suite            make test-slow   the long tests
# make check      ruff and mypy                 make clean       remove .venv and what was built
# make test-versions  a part of the tests with the oldest and newest versions of Python, torch and transformers that are
#                 allowed: tests/versions.py; an hour and several GB; VERSIONS="--python 3.12 --torch newest" for a part
# make bench-memory bench-model bench-streaming bench-torch_path bench-packing bench-estimate bench-resources
# make bench-copy bench-mqar bench-language bench-family bench-learners bench-needle bench-overhead bench-hf_swap bench-generation
# make bench-stages bench-long bench-parallel
#                 minutes each, on a machine with nothing else to do: benchmarks/
# PYTHON=python3.12 make ...    picks the interpreter that .venv is made from (3.11 or newer; 3.10 for demo and benchmarks)

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet --quiet
SETTINGS := pyproject.toml setup.py constraints.txt
FOLDERS := blocks kernels recipes registry tools
# One thread for each of pytest's workers: more of them than cores makes small tensors many times slower. Each worker
# takes neighbouring tests, which share fixtures and imports, and then some of the other's.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-versions check clean bench-memory bench-model bench-streaming bench-torch_path bench-packing bench-estimate bench-resources bench-copy bench-mqar bench-language bench-family bench-learners bench-needle bench-overhead bench-hf_swap bench-generation bench-stages bench-long bench-parallel

demo: .venv/.installed
	@echo "building the MAC recipe and trying it on README.md: about 10 seconds"
	.venv/bin/titans-build mac --try README.md

test: .venv/.installed-dev
	$(PYTEST)

test-slow: .venv/.installed-dev
	$(PYTEST) -m slow

test-versions:
	$(PYTHON) tests/versions.py $(VERSIONS)

# the checkout may have any name: through the link mypy sees the package by its own
check: .venv/.installed-dev
	.venv/bin/ruff check .
	mkdir -p .venv/typecheck
	ln -sfn ../.. .venv/typecheck/titans_build
	cd .venv/typecheck && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../mypy_cache \
		-m titans_build -m titans_build.huggingface $(FOLDERS:%=-p titans_build.%)

BENCH := .venv/bin/python benchmarks
WRITE = --json benchmarks/results/$*.json && $(BENCH)/render.py

bench-memory bench-model: bench-%: .venv/.installed-bench
	$(BENCH)/$*.py $(WRITE)

bench-streaming bench-stages: bench-%: .venv/.installed
	$(BENCH)/$*.py $(WRITE)

bench-needle: bench-%: .venv/.installed
	OMP_NUM_THREADS=1 $(BENCH)/$*.py $(WRITE)

bench-generation: bench-%: .venv/.installed
	OMP_NUM_THREADS=1 $(BENCH)/$*.py $(WRITE)

bench-estimate bench-resources: bench-%: .venv/.installed-dev
	$(BENCH)/kernel_$*.py $(WRITE)

bench-overhead bench-packing bench-torch_path bench-learners: bench-%: .venv/.installed
	OMP_NUM_THREADS=1 $(BENCH)/steps.py $* $(WRITE)

bench-copy bench-mqar bench-language bench-family: bench-%: .venv/.installed-plots
	$(BENCH)/variants.py $* --plots benchmarks/plots $(WRITE)

bench-long bench-parallel: bench-%: .venv/.installed-plots
	OMP_NUM_THREADS=1 $(BENCH)/$*.py --plots benchmarks/plots $(WRITE)

bench-hf_swap: bench-%: .venv/.installed-hf
	$(BENCH)/$*.py $(WRITE)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "titans-build needs Python 3.10 or newer: PYTHON=/path/to/python3 make ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing titans-build with PyTorch and its other dependencies into .venv: some minutes"

.venv/.installed: .venv/bin/python $(SETTINGS)
	$(PIP) install --editable . --constraint constraints.txt
	@touch $@

.venv/.installed-dev: .venv/bin/python $(SETTINGS)
	$(PIP) install --editable ".[dev]" --constraint constraints.txt
	@touch $@ .venv/.installed

# what the benchmarks compare with
.venv/.installed-bench: .venv/.installed
	$(PIP) install titans-pytorch==0.5.5 --constraint constraints.txt
	@touch $@

# the library whose models are swapped into
.venv/.installed-hf: .venv/.installed
	$(PIP) install --editable ".[hf]" --constraint constraints.txt
	@touch $@

# what draws plots
.venv/.installed-plots: .venv/.installed
	$(PIP) install --editable ".[train]" --constraint constraints.txt
	@touch $@

clean:
	rm -rf .venv build dist benchmarks/runs .pytest_cache .mypy_cache .ruff_cache
