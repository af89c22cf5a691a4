# Every target that runs something installs what it needs first: a virtual environment in .venv with
# the tested versions of constraints.txt. `make` alone lists the targets.
#
#   PYTHON      The interpreter to build .venv with (3.11 or later).   make venv PYTHON=python3.12
#   TORCH_ARGS  Extra pip arguments for torch, to choose its CPU or CUDA build (docs/install.md).
#   ARGS        Extra arguments for the script or for pytest.          make demo ARGS="--seed 1"

PYTHON ?= python3
TORCH_ARGS ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECKED := pwm_gym examples benchmarks tests setup.py

.PHONY: help venv demo test test-expensive ground-truth-study multitask-study sb3-suite speed lint format type spell \
	commit-checks coverage rendering clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/^([a-z0-9-]+):.*## */  make \1|/' \
		| while IFS='|' read -r target what; do printf '%-22s %s\n' "$$target" "$$what"; done

venv: $(STAMP)  ## Create .venv and install the pinned dependencies

# torch comes first and pinned: an open range would fetch gigabytes for a build that nobody tested.
# labmaze, which only dm_control's mazes use, has no wheel for Python 3.13 and later; there the pins
# are a complete list and are installed without it.
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt $(wildcard pwm_gym/_*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "pwm_gym needs Python 3.11 or later; choose one with: make $(MAKECMDGOALS) PYTHON=python3.12"; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing the pinned dependencies into .venv (once, a few minutes) ..."
	@$(PIP) install -q -c constraints.txt $(TORCH_ARGS) torch
	@$(PIP) install -q -c constraints.txt setuptools
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
		$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[all,dev]'; \
	else \
		grep -v '^labmaze==' constraints.txt > .venv/pins.txt && \
		$(PIP) install -q --no-deps -r .venv/pins.txt && \
		$(PIP) install -q --no-deps --no-build-isolation -e .; \
	fi
	@touch $(STAMP)

# One thread: a second gains a fifth on an idle machine, and on a busy one threads that wait for each other cost
# ten times that and more.
demo: $(STAMP) rendering  ## Train PWM on cartpole-swingup, evaluate it, write a plot and a video
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python examples/quickstart.py $(ARGS)

test: $(STAMP) rendering commit-checks  ## Run all checks and the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-expensive: $(STAMP) rendering  ## Run the tests that train for longer
	$(BIN)/python -m pytest -m expensive $(ARGS)

ground-truth-study: $(STAMP)  ## Gradients of true dynamics against those of models; long: it goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ground_truth_study.py $(ARGS)

sb3-suite: $(STAMP)  ## Run Stable-Baselines3's own test-suite against PWM
	$(BIN)/python tests/sb3_suite/run.py $(ARGS)

# Hours on two cores. A task, a model or a policy that is done is not done again.
multitask-study: $(STAMP) rendering  ## One multi-task model, a policy for each task: data, model, policies, table
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python benchmarks/multitask_study.py $(ARGS)

# A ratio may get worse by 15 % before it fails: what else the machine does moves most of them by less.
speed: $(STAMP)  ## Measure speed again and compare with results/speed; REFERENCE=FOLDER with PWM's released code
	$(BIN)/python benchmarks/speed.py --check 0.15 $(if $(REFERENCE),--reference $(REFERENCE)) $(ARGS)

lint: $(STAMP)  ## Check style and format, change nothing
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

format: $(STAMP)  ## Format the code and repair what ruff can
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

type: $(STAMP)  ## Check the types
	$(BIN)/mypy

spell: $(STAMP)  ## Check the spelling
	$(BIN)/codespell

commit-checks: lint type spell  ## Everything that pre-commit checks

coverage: $(STAMP) rendering  ## Run the tests and report what they cover
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov $(ARGS)

# A hint only: training needs no rendering, and pwm_gym chooses the backend itself.
rendering: $(STAMP)
	@[ "$$(uname)" != Linux ] || [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || { \
		for gl in $${MUJOCO_GL:-egl osmesa}; do \
			MUJOCO_GL=$$gl $(BIN)/python -c 'import mujoco; mujoco.GLContext(8, 8)' \
				>/dev/null 2>&1 && exit 0; \
		done; \
		echo "No OpenGL that draws without a display: no videos, and tests that render can't run."; \
		echo "On Debian or Ubuntu: apt-get install libegl1 libgl1 (docs/install.md says more)."; }

clean:  ## Remove caches and build products (keeps .venv; remove that with rm -rf .venv)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	find pwm_gym examples benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
