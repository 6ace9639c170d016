# Needs Python 3.11, g++, make and git; every target sets up what it needs, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# One OpenMP thread per test process: oversubscribed OpenMP is many times slower than one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup operators quickstart denoise segmentation detection test test-fast lint clean

help:
	@echo "make quickstart  train GroupMamba-T on handwritten digits, then label held-out ones"
	@echo "make denoise     train Restore-RWKV to remove noise from photographs, then compare it"
	@echo "make segmentation  GroupMamba-T segments digits on photographs, from the quickstart's weights and from random ones"
	@echo "make detection   Mask R-CNN finds them; builds mmcv's operators first, once, in ten minutes or more"
	@echo "make test        the whole test suite      make test-fast  without the slow tests"
	@echo "make lint        ruff check and format     make clean      remove the environment and what runs wrote"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,export,cuda,dev]"
	touch $@

# mmdet needs mmcv's compiled operators. No wheel of them is published for this torch, and pip's own cache cannot tell
# one with them from one without: it is kept here, by the versions that it was built for.
BUILT_FOR := $(shell sed -n 's/^\(onedl-mmcv\|torch\)==/\1-/p' constraints.txt | paste -sd-)
WHEELS ?= $(HOME)/.cache/linzoo/wheels/$(BUILT_FOR)

operators: $(VENV)/.operators

$(VENV)/.operators: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,export,cuda,dev,det]" ninja wheel setuptools
	@ls $(WHEELS)/onedl_mmcv-*.whl >/dev/null 2>&1 || echo "Building mmcv's operators, once: ten minutes or more."
	ls $(WHEELS)/onedl_mmcv-*.whl >/dev/null 2>&1 || PATH="$(abspath $(BIN)):$$PATH" MMCV_WITH_OPS=1 \
		$(BIN)/python -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation -c constraints.txt \
		onedl-mmcv -w $(WHEELS)
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall $(WHEELS)/onedl_mmcv-*.whl
	touch $@

quickstart: setup
	$(BIN)/python tools/quickstart.py

denoise: setup
	$(BIN)/python tools/denoise.py

segmentation: setup
	$(BIN)/python tools/scenes.py segmentation

detection: operators
	$(BIN)/python tools/scenes.py detection --no-comparison

test: setup
	@$(MAKE) operators || echo "mmcv's operators could not be built: the tests of detection are skipped."
	$(PYTEST) tests

test-fast: setup
	$(PYTEST) -m "not slow" tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info data work_dirs
