# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv; `make clean` undoes it.
#
# torch is installed first and alone: pip then takes the build that this machine is set up for (its CPU build where pip
# is pointed at one), and the constraints keep every later package from choosing another.

# the first of these that runs and is 3.11 or 3.12 (a name on the path may be a shim that does not run)
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
  $$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && echo $$p && break; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
STAMP  := $(VENV)/.installed

# make gpu installs nothing: a PYTHON that is given, else that of .venv, else the first that was found
GPU_PYTHON = $(if $(filter-out file,$(origin PYTHON)),$(PYTHON),$(firstword $(wildcard $(BIN)/python) $(PYTHON)))

.PHONY: install demo test test-all bench gpu lint docs clean help

help:
	@echo "make install | demo | test | test-all | bench | gpu | lint | docs | clean"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or 3.12 on the path, found neither; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(STAMP)

demo: install
	$(BIN)/pytc demo --out outputs/demo --overwrite

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not gpu"

# with coverage, which costs a quarter of the time
test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu" --cov --cov-report=term --cov-fail-under=85

bench: install
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# nine minutes on a GPU; without one the tiny version on the CPU. GPU_OPTIONS="--minutes 5 --data DIR"
gpu:
	@$(or $(GPU_PYTHON),python3) benchmarks/gpu.py $(GPU_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# site/index.html: any page without a place, any link or anchor that leads nowhere is an error
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir site

clean:
	rm -rf $(VENV) outputs site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
