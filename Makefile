# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install dev lint format types test bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

dev: $(VENV)/dev

$(VENV)/dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[demo,dev]"
	mkdir -p .types && ln -sfn .. .types/blip2_search
	touch $@

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: dev
	$(BIN)/mypy

test: dev
	$(BIN)/pytest

bench: dev
	$(BIN)/python -m blip2_search.benchmarks.recall --help

clean:
	rm -rf $(VENV) .types build *.egg-info
