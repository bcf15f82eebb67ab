# Everything is installed into .venv; nothing outside this folder is touched. A stamp file says that .venv is up to date
# with pyproject.toml and constraints.txt, so a second 'make setup' takes no time. Every install goes through
# constraints.txt: without it, pip may choose another PyTorch and with it gigabytes of CUDA libraries.

VENV        ?= .venv
BIN         := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CPU_INDEX   := https://download.pytorch.org/whl/cpu
INPUTS      := pyproject.toml constraints.txt

# The first Python of a version that medcot runs on and that can make a venv; each is tried, since a name on the PATH may
# be a shim for a version that is not there. 3.11 comes first because the pinned set was tested with it.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3 python,$(shell $(name) -c \
	'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	>/dev/null 2>&1 && echo $(name))))

.DEFAULT_GOAL := help
.PHONY: help setup setup-test run test docs clean

help: ## Say what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'
	@echo
	@echo "  make run ARGS='tutorial-8b train.max_steps=10' passes words on to 'medcot run'."
	@echo "  make setup CPU=1 takes PyTorch's CPU build (smaller; Linux without an NVIDIA GPU)."

setup: $(VENV)/.up-to-date ## Fill .venv with medcot and its command

setup-test: $(VENV)/.up-to-date-test # as setup, with what the tests need

run: setup ## Set up, then run the whole job: ask, fine-tune, ask again, save, report
	$(BIN)/medcot run $(ARGS)

test: setup-test ## Set up, then check style and types and run the tests
	$(BIN)/ruff check src tests bench docs notebooks/*.py
	$(BIN)/ruff format --check src tests bench docs notebooks/*.py
	$(BIN)/mypy
	$(BIN)/python -m pytest

docs: setup-test ## Set up, then write the docs site into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean: ## Remove .venv and what tools left behind; runs/ stays
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find src tests bench -type d -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "medcot needs Python 3.11, 3.12 or 3.13, with venv; none was found." \
		"Name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.up-to-date: $(INPUTS) | $(BIN)/python
ifdef CPU
	$(PIP_INSTALL) torch --index-url $(CPU_INDEX)
endif
	@echo "Installing medcot into $(VENV); the first time takes minutes."
	$(PIP_INSTALL) -e .
	@touch $@

# After setup, so that the two never install at once (make -j).
$(VENV)/.up-to-date-test: $(VENV)/.up-to-date
	$(PIP_INSTALL) -e '.[test]'
	@touch $@
