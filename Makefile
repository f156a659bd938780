# The same few commands on a laptop and in CI. `make quickstart` needs nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= $(shell grep '^torch==' constraints.txt)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check
SHELL  := /bin/bash

# Installing again is needed only when one of these changed; an editable install follows the code by itself.
INSTALLED_FROM := pyproject.toml constraints.txt $(wildcard setup.py pipeline/dropout/kernels/*.cpp)

.PHONY: help quickstart test drills check bench clean
help:
	@echo "make quickstart  install, then fine-tune, evaluate and report on real data (offline, CPU)"
	@echo "make test        install, then run all tests"
	@echo "make drills      every engine and stage stopped, killed and broken in every way, tens of minutes"
	@echo "make check       ruff, ruff format, mypy"
	@echo "make bench       comparisons with the usual tools, a few minutes"

quickstart: $(VENV)/.demo
	$(BIN)/masklock quickstart

test: $(VENV)/.test
	@started=$$(date +%s); $(BIN)/python -m pytest $(PYTEST_ARGS); status=$$?; \
	echo "make test: pytest took $$(( $$(date +%s) - started )) s"; exit $$status

drills: $(VENV)/.test
	$(BIN)/python -m pytest -m drill $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	@set -e; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) build masklock.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Masklock needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that pip's own configuration decides between a CPU and a GPU build.
# A GPU build brings the triton it needs, which then takes the place of the tested one.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo 'Installing $(TORCH) ...'
	@$(PIP) '$(TORCH)'
	@own=$$($(BIN)/python -c 'import triton' 2> /dev/null && echo '/^triton==/d'); \
	sed -e 's/^torch==.*/$(TORCH)/' -e "$$own" constraints.txt > $(VENV)/constraints.txt
	@touch $@

$(VENV)/.demo: $(INSTALLED_FROM) $(VENV)/.torch
	@echo 'Installing masklock[demo] with the tested versions ...'
	@$(PIP) -c $(VENV)/constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test: $(INSTALLED_FROM) $(VENV)/.torch
	@echo 'Installing masklock[demo,test] with the tested versions ...'
	@$(PIP) -c $(VENV)/constraints.txt -e '.[demo,test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(INSTALLED_FROM) $(VENV)/.torch
	@echo 'Installing masklock[demo,dev] with the tested versions ...'
	@$(PIP) -c $(VENV)/constraints.txt -e '.[demo,dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.test
