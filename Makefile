# Every target works in a fresh clone: the first run makes .venv and installs into it, later runs reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# The fast tests sync thousands of small files; in memory, where there are 4 GB of it, they take three quarters of the time.
MEMORY := $(shell [ "$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}')" -gt 4000000 ] && echo TMPDIR=/dev/shm)

.DEFAULT_GOAL := help
.PHONY: help demo test test-frameworks torture lint fmt bench-save bench-load bench-async bench-track bench-hooks bench-scale clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train, kill, resume and compare on real images (examples/digits.py)
	$(BIN)/python examples/digits.py

test: lint ## lint, then the fast tests, then the slow ones
	$(MEMORY) $(BIN)/python -m pytest -n auto -m "not slow"
	$(BIN)/python -m pytest -n auto -m slow -rs

test-frameworks: $(VENV)/.frameworks ## every cell of the matrix of frameworks, and their integrations (installs them all: 4 GB)
	$(MEMORY) MODEL_CHECKPOINT_REQUIRE_FRAMEWORKS=1 $(BIN)/python -m pytest -n auto tests/frameworks

torture: $(VENV)/.dev ## the fault tests in their long form: kills, power loss, failing disks, bit rot, races (an hour on two cores)
	$(BIN)/python -m pytest -n auto --torture -rs tests/faults tests/test_crash.py

lint: $(VENV)/.dev ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/.dev ## format the code and apply the safe fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench-save: $(VENV)/.bench ## durable saves against torch.save, safetensors, DCP and Orbax (benchmarks/save.py)
	$(BIN)/python benchmarks/save.py

bench-load: $(VENV)/.bench ## loads against the same (benchmarks/load.py)
	$(BIN)/python benchmarks/load.py

bench-async: $(VENV)/.bench ## how long background saves hold training up (benchmarks/async_save.py)
	$(BIN)/python benchmarks/async_save.py

bench-track: .venv-track/.made ## what tracking costs, against MLflow, trackio, Aim, W&B and tensorboardX (benchmarks/track.py)
	.venv-track/bin/python benchmarks/track.py

bench-hooks: $(VENV)/.bench ## what an event costs, with listeners and without (benchmarks/hooks.py)
	$(BIN)/python benchmarks/hooks.py

bench-scale: $(VENV)/.dev ## measure how saving, listing and retention scale (benchmarks/scale.py)
	$(BIN)/python benchmarks/scale.py

clean: ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) .venv-track demo_run build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last when an environment is made, so its presence says that the environment is whole.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.frameworks: pyproject.toml constraints.txt | $(VENV)/.dev
	$(INSTALL) -e '.[frameworks]'
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/.dev
	$(INSTALL) -e '.[bench]'
	@touch $@

# The trackers want other versions of the same packages than the rest, so they have an environment of their own.
.venv-track/.made: pyproject.toml
	$(PYTHON) -m venv .venv-track
	.venv-track/bin/python -m pip install -q --disable-pip-version-check -e '.[bench-track]'
	@touch $@

# After .demo, never beside it: under make -j two pips would write into one environment.
$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.demo
	$(INSTALL) -e '.[dev]'
	@touch $@
