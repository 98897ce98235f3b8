# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo dev lint format types test bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

demo: install
	$(BIN)/blip2-search demo

dev: $(VENV)/dev

$(VENV)/dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[demo,dev,evaluate,train]"
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

# make bench DATA=dataset_flickr8k.json IMAGES=DIR [SPLIT=val RERANK=128]
SPLIT ?= test
RERANK ?= 128
bench: dev
	$(BIN)/python -m blip2_search.benchmarks.recall --data $(DATA) --images $(IMAGES) --split $(SPLIT) --rerank $(RERANK)

clean:
	rm -rf $(VENV) .types build *.egg-info
