# FedPEAT: everything a person runs by hand. `make help` explains.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all lint format docs bench wheel clean
.DEFAULT_GOAL := help

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# PyTorch first and by its exact version: a range would bring the newest build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

setup: $(READY)  ## make .venv with the tested versions

demo: $(READY)  ## set up, then run the main job: a federation on real text (about two minutes)
	$(BIN)/fedpeat simulate experiment=demo

test: $(READY)  ## set up, then run the fast tests, on up to 8 cores
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadscope

test-all: $(READY)  ## run all tests, the slow ones too (Ray, real processes, the wheel)
	$(BIN)/python -m pytest -q -m "not gpu and not hub"

lint: $(READY)  ## ruff, pyright, import laws
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## write the generated pages anew (configuration, metrics)
	$(BIN)/python -m simulations.documentation

bench: $(READY)  ## speed and memory, side by side with the bare PyTorch loop
	$(BIN)/python benchmarks/simulation.py

wheel: $(READY)  ## build the wheel into dist/
	$(BIN)/python -m build -q --wheel

clean:  ## remove what was built (not runs)
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache
