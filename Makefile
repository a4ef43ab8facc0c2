# Two commands matter: `make demo` and `make test`. Both build .venv themselves; no network beyond pip.

PYTHON ?= python3
VENV := .venv
PEERS := $(VENV)/peers
BIN := $(VENV)/bin
# Sleeping OpenMP threads: spinning ones stall each other when the machine has other work.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-slow check format bench bench-peers clean

$(VENV)/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,demo]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/python demo.py

test: $(VENV)/ready
	$(BIN)/python -m pytest

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready
	$(BIN)/python benchmarks/allocation.py
	$(BIN)/python benchmarks/minilm.py
	$(BIN)/python benchmarks/smollm2.py

bench-peers: $(VENV)/ready
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet torch==2.13.0
	$(PEERS)/bin/pip install --quiet torch==2.13.0 llmcompressor==0.14.0.1 auto-round==0.15.1
	$(BIN)/python benchmarks/peers.py --peer-python $(PEERS)/bin/python

clean:
	rm -rf $(VENV) demo-output build dist
