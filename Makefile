# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format docs bench results clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mlkit needs Python 3.11 or newer; set PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,hf]'
	touch $(STAMP)

setup: $(STAMP)  ## make .venv with everything that demo and test need

demo: $(STAMP)  ## train on real data and compare coreset methods (two minutes on a CPU)
	$(BIN)/python train.py recipe=ccs

test: $(STAMP)  ## the default tests
	$(BIN)/python -m pytest

test-all: $(STAMP)  ## the slow tests too
	$(BIN)/python -m pytest -m "not gpu and not flower and not vllm"

check: $(STAMP)  ## lint, types (static, and of tensors while tests run), docs
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/coresets --jaxtyping-packages=mlkit.coresets,beartype.beartype -k "not bad"
	$(BIN)/mkdocs build --strict --site-dir site

format: $(STAMP)  ## rewrite the sources in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## serve the documentation on this machine
	$(BIN)/mkdocs serve

bench: $(STAMP)  ## measure every subject against its peers
	$(BIN)/python scripts/bench.py ccs --json docs/results/bench-ccs.json
	$(BIN)/python scripts/bench.py lte --json docs/results/bench-lte.json
	$(BIN)/python scripts/bench.py serving --json docs/results/bench-serving.json
	$(BIN)/python scripts/bench.py federated --json docs/results/bench-federated.json
	$(BIN)/python scripts/bench.py embeddings --json docs/results/bench-embeddings.json

results: $(STAMP)  ## rerun the experiments behind docs/RESULTS.md
	$(BIN)/python scripts/reproduce.py

clean:  ## remove what the commands above made, but not .venv
	rm -rf site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
