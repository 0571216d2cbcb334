# All targets work inside .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Of the main job: lora, qlora, dora or full.
METHOD ?= lora
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
# The oldest supported stack on Python 3.11, the newest on anything later.
CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py311.txt,py312.txt)
STAMP := $(VENV)/.setup

.PHONY: setup run test test-fast bench docs notebooks package lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(BIN)/jaxml download smollm2-135m minilm
	touch $(STAMP)

run: setup
	$(BIN)/jaxml quickstart --method $(METHOD)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow'

bench: setup
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,oracle]'
	$(BIN)/python benchmarks/lm.py
	$(BIN)/python benchmarks/attention.py

# The API reference: static pages in build/api.
docs: setup
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	JAX_PLATFORMS=cpu PYTHONWARNINGS=ignore $(BIN)/python -m pdoc --docformat google --math -o build/api jaxml '!jaxml.cli'

# Executes the notebooks in full and stores their outputs.
notebooks: setup
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[notebooks]'
	$(BIN)/python colab/build.py

# Source archive and wheel in dist/, checked.
package: setup
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
