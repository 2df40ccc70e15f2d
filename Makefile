PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test test-slow lint format bench clean

setup: $(VENV)/.installed

# Made anew when the dependencies change; an interrupted install leaves no stamp and is repeated.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt ".[dev]"
	touch $@

demo: setup
	$(BIN)/python tools/run_pipeline.py --config configs/shapes.yaml --output runs/demo

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python tools/benchmarks/run_all.py

clean:
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
