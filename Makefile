# make serve   converts the bundled demo checkpoint to MLA and serves it on 127.0.0.1:8000
# make test    runs every check and test
# make compare times the converted demo against its source
# All make .venv and install into it first. Another interpreter: make serve PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8000
SOURCE := demo/stories

.PHONY: serve test compare lint clean
# A conversion appears whole or not at all; make must not take a file out of it when it is interrupted.
.PRECIOUS: mla/config.json

serve: mla/config.json
	$(BIN)/python -m server --model mla --port $(PORT)

compare: mla/config.json $(VENV)/.test
	$(BIN)/python -m bench compare --mla mla --gqa $(SOURCE) --json compare.json --plot compare.png

# Without refinement, which makes the result better and takes three times as long, so that the demo starts soon.
mla/config.json: $(SOURCE)/model.safetensors | $(VENV)/.run
	$(BIN)/python -m convert --model $(SOURCE) --out mla --overwrite --calibration-tokens 8192 --refine none

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) mla compare.json compare.png
