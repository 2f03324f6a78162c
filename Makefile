# Everything a newcomer or a CI job runs. `make demo` and `make test` set up what they need on a bare Debian 12 with Python 3.11.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A second environment, with what users of today have: the newest NumPy, without pynq, which needs NumPy 1; and the newest torch that has a CPU
# build everywhere. Another one, which may bring CUDA packages of several GB: `make test-numpy2 NEWEST=.venv-torch NEWEST_TORCH=2.14.1`.
NEWEST := .venv-numpy2
NEWEST_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# Of all tests, those in which NumPy or torch could differ. Not: mutants, sanitizers, and projects of hls4ml, which take minutes to compile.
NEWEST_TESTS := tests/property tests/cost tests/tasks/test_data.py \
  tests/hardware/test_export.py tests/study/test_compare_report.py tests/numerics/test_gemm.py tests/numerics/test_oracle.py tests/maps \
  tests/study/test_report.py tests/tasks/test_text.py tests/trainer/test_lightning.py tests/nn/test_operators.py \
  tests/hardware/test_offload.py tests/fpga/test_operand.py tests/fpga/test_csim.py tests/fpga/test_config.py tests/fpga/test_devices.py \
  tests/fpga/test_emit.py tests/fpga/test_selftest.py tests/fpga/test_core_oracle.py
NEWEST_LEFT_OUT := sanitized or (test_devices and reference)

# Both C++ trees, and the harness that runs mutated jobs.
CPP := $(shell find fpga/hls dynasty_lightning/numerics/backends/cpp tests/fuzz -name '*.h' -o -name '*.cpp')

.PHONY: help demo test test-numpy2 soak fuzz check csim bench notebooks clean setup system
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: setup  ## Train on scikit-learn's digits: float32, uniform 8 bits, dynamic precision; pictures and figures in runs/
	$(BIN)/python -m dynasty_lightning demo

test: setup system  ## Run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-numpy2: $(NEWEST)/.installed system  ## Run what NumPy 2 could change, in an environment of its own
	$(NEWEST)/bin/python -m pytest $(PYTEST_ARGS) $(NEWEST_TESTS) -k "not ($(NEWEST_LEFT_OUT))"

soak: setup system  ## Train, offload and tear down for an hour: memory, descriptors and threads stay flat
	$(BIN)/python -m tests.soak --minutes 60

check: setup  ## Lint, format of Python and C++, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: setup  ## Feed a million mutated files to every reader, under limits of memory and time
	$(BIN)/python -m tests.fuzz --count 1000000

csim: setup  ## Compile the core's C++ and compare it with its reference
	$(BIN)/python -m fpga csim --bench

bench: setup  ## Run the benchmarks at smoke size
	set -e; for b in benchmarks/bench_*.py; do $(BIN)/python $$b --smoke; done

notebooks: setup  ## Execute the notebooks
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[notebooks]'
	$(BIN)/python -m pytest --nbmake notebooks -o addopts="" -p no:cacheprovider

setup: $(STAMP)

# pip finds a CPU build of torch where PIP_FIND_LINKS or the index offers one.
$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV): Python packages as constraints.txt pins them"
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call apt_install,python3-venv); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,fpga,pynq,gpu,rtl]'
	@touch $@

$(NEWEST)/.installed: pyproject.toml constraints.txt constraints-newest.txt
	@echo "== setting up $(NEWEST): torch $(NEWEST_TORCH) and the newest NumPy, everything else as constraints.txt pins it"
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call apt_install,python3-venv); }
	@$(NEWEST)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(NEWEST)
	{ grep -vE '^(torch|triton|numpy)[=<>]' constraints.txt; cat constraints-newest.txt; echo 'torch==$(NEWEST_TORCH)'; } > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install -q -c $(NEWEST)/constraints.txt -e '.[dev,fpga]'
	@touch $@

# g++ for the C simulation, tclsh for tests of the vendor tool's scripts, and Fashion-MNIST for `demo --data fashion-mnist` and the study;
# a test that needs one says so where it is missing.
system:
	@command -v $${CXX:-g++} >/dev/null || { $(call apt_install,g++); } || echo "== g++ could not be installed: C simulation needs it"
	@command -v tclsh >/dev/null || { $(call apt_install,tcl); } || echo "== tcl could not be installed: tests of the vendor scripts need it"
	@[ -d /usr/share/datasets/fashion-mnist ] || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] || { $(call apt_install,dataset-fashion-mnist); } \
	  || echo "== dataset-fashion-mnist could not be installed"

# The package lists are fetched only if the package is not found without them.
apt_install = echo "== installing Debian package $(1)"; \
	apt-get install -y -qq $(1) >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq $(1) >/dev/null; }

clean:  ## Remove the virtual environment and caches, not runs/
	rm -rf $(VENV) $(NEWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
