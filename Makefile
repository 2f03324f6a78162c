# Everything a newcomer or a CI job runs. `make demo` and `make test` set up what they need on a bare Debian 12 with Python 3.11.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test check csim bench notebooks clean setup system
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: setup  ## Train on scikit-learn's digits: float32, uniform 8 bits, dynamic precision; pictures and figures in runs/
	$(BIN)/python -m dynasty_lightning demo

test: setup system  ## Run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup  ## Lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

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
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,fpga,pynq,gpu]'
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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
