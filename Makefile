# make setup | train | test | test-slow | lint
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup train test test-slow lint clean

setup: $(STAMP)

# pip, not another installer: on some machines only pip finds the CPU build of torch.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, say: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

train: setup
	$(BIN)/python train.py -m profile=laptop experiment=pair seed=1

test: setup
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m 'cuda and not slow' tests/cuda

test-slow: setup
	$(BIN)/python -m pytest -m '(slow or hypothesis) and not cuda' --hypothesis-profile=thorough --durations=40
	$(BIN)/python -m pytest -m 'cuda and slow' tests/cuda

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
