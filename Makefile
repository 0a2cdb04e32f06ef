# Two commands on a fresh machine: `make demo` and `make test`. Everything is in .venv; `make clean` removes it.
#
# torch is installed first and alone, so that pip takes the build that this machine is set up for (a CPU build if pip is
# pointed at one); the constraints keep later packages from choosing another.

# the first of these that runs and is 3.11 to 3.14 (a name on the path may be a shim that does not run)
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
  $$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
STAMP  := $(VENV)/.installed

# make gpu installs nothing: a PYTHON that is given, else that of .venv, else the first that was found
GPU_PYTHON = $(if $(filter-out file,$(origin PYTHON)),$(PYTHON),$(firstword $(wildcard $(BIN)/python) $(PYTHON)))

.PHONY: install demo test test-all bench gpu lint docs wheel clean help

help:
	@echo "make install | demo | test | test-all | bench | gpu | lint | docs | wheel | clean"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.14 on the path; set PYTHON=/path/to/python3.11"; exit 1; }
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

# a wheel that installs into an environment without this folder, and works there
wheel:
	rm -rf dist build/wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd build && wheel/bin/pytc demo --preset tiny --out wheel/demo --overwrite training.max_epochs=1 data.patches_per_epoch=8

clean:
	rm -rf $(VENV) outputs site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
