# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo dev lint format types test bench bench-flickr30k bench-coco clean

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

# The paper's tables, BLIP-2 beside CLIP; a GPU is advised. The datasets lie in DATA.
DATA ?= data
MODELS ?= --model blip2-itm-vit-g-coco --model blip2-itm-vit-g --model open_clip:ViT-L-14/openai
RECALL = $(BIN)/python -m blip2_search.benchmarks.recall --root $(DATA)
bench-flickr30k: dev
	$(RECALL) --dataset flickr30k $(MODELS)
bench-coco: dev
	$(RECALL) --dataset coco $(MODELS)

# The tables of `mini` in README.md.
bench: dev
	$(RECALL) --dataset flickr8k --split val --rerank 128
	$(BIN)/python -m blip2_search.benchmarks.tables

clean:
	rm -rf $(VENV) .types build *.egg-info
