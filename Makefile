# Two commands matter: `make demo` and `make test`. Both build .venv themselves; no network beyond pip.
# What is installed is written down in constraints.txt; `make constraints` writes it anew from pyproject.toml.

PYTHON ?= python3
VENV := .venv
PEERS := $(VENV)/peers
LATEST := $(VENV)/latest
TORCH := torch==2.13.0
BIN := $(VENV)/bin
# Sleeping OpenMP threads: spinning ones stall each other when the machine has other work.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-slow test-cpus test-latest check constraints format bench bench-peers clean

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/python demo.py

# One process and one thread for each of two cores; the tests of a file run in one process and share what they build.
test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

# The same files as an AVX2 processor and as an ARM64 one, by qemu; run before what touches kernels, exports or formats.
# Installs qemu-user where it is missing (root, once), and 1.5 GB for ARM64 in .venv/arm64.
test-cpus: $(VENV)/ready
	$(BIN)/python tests/cpus/run.py

# The newest release of everything that pyproject.toml allows, in an environment of its own; run before a release.
test-latest:
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet $(TORCH)
	$(LATEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev,demo]' $(TORCH)
	$(LATEST)/bin/python -m pytest -n 2 --dist loadfile

# Exact versions of everything that the extras need, with the torch that the tests run on.
constraints: $(VENV)/ready
	$(BIN)/pip install --quiet uv
	echo '$(TORCH)' | $(BIN)/uv pip compile pyproject.toml --all-extras --upgrade --python-version 3.11 \
		--constraint - --no-annotate --no-header --output-file constraints.txt

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
