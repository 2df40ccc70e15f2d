PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

OLDEST := .venv-oldest

.PHONY: setup demo pretrained test chromium test-slow test-oldest fuzz lint format bench clean

setup: $(VENV)/.installed

# Made anew when the dependencies change; an interrupted install leaves no stamp and is repeated.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt ".[dev]"
	touch $@

demo: setup
	$(BIN)/python tools/run_pipeline.py --config configs/shapes.yaml --output runs/demo

# Trains the weights in the box again, which takes hours on two cores (docs/model_card.md).
pretrained: setup
	$(BIN)/python tools/run_pipeline.py --config configs/pretrained.yaml --output runs/pretrained
	for stage in sharpmask multipathnet; do \
		$(BIN)/python tools/pack_weights.py --checkpoint runs/pretrained/$$stage \
			--output models/pretrained/$$stage.pt || exit 1; \
	done

# Two workers, each with one thread: on two cores that takes little more than half of the time.
test: setup chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The page's tests need a browser, and skip where there is none and none can be installed.
chromium:
	@command -v chromium > /dev/null || test "$$(id -u)" != 0 || \
		{ apt-get update && apt-get install -y chromium; } > /dev/null 2>&1 || true

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The fuzzed tests, 15,000 cases each; prints how many have run.
fuzz: setup
	MASKPATH_FUZZ_CASES=15000 $(BIN)/python -m pytest -m fuzz

# With the lowest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest

$(OLDEST)/.installed: pyproject.toml tests/oldest.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python tests/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint $(OLDEST)/constraints.txt ".[dev]"
	touch $@

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
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info $(OLDEST)
