# make demo | test | test-full | check | bench.   PYTHON is any Python ≥ 3.11; everything else lands in VENV.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-full parity check format bench clean

help:
	@echo "make demo       draw a sheet of pictures from prompts (pocket-sheet.png)"
	@echo "make test       the tests, without the long ones"
	@echo "make test-full  all tests"
	@echo "make parity     docs/parity.md from the parity tests, published sizes included (minutes, 12 GB)"
	@echo "make check      lint, format and types"
	@echo "make format     rewrite the code in the house format"
	@echo "make bench      speed and memory on this machine"

$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps k-diffusion
	@touch $@

demo: $(VENV)/.core
	$(BIN)/python examples/sheet.py pocket-sheet.png

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full" --numprocesses auto --dist loadfile

test-full: $(VENV)/.dev
	$(BIN)/python -m pytest

parity: $(VENV)/.dev
	mkdir -p build && rm -f build/parity.jsonl
	$(BIN)/python -m pytest tests/parity --parity build/parity.jsonl
	$(BIN)/python tests/parity/report.py build/parity.jsonl docs/parity.md

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) build dist
