# Needs Python 3.11, g++, make and git; every target sets up what it needs, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TESTS ?= tests

# One OpenMP thread per test process: oversubscribed OpenMP is many times slower than one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

KERNELS := $(wildcard ops/*.h ops/*.cuh ops/*/*.cpp ops/*/*.cu tests/ops/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart denoise segmentation detection test test-fast test-newest test-clients docs wheel lint clean

help:
	@echo "make quickstart  train GroupMamba-T on handwritten digits, then label held-out ones"
	@echo "make denoise     train Restore-RWKV to remove noise from photographs, then compare it"
	@echo "make segmentation  GroupMamba-T segments digits on photographs, from the quickstart's weights and from random ones"
	@echo "make detection   Mask R-CNN with it finds them"
	@echo "make test        the whole test suite      make test-fast  without the slow tests"
	@echo "make test-newest  the fast tests under the newest torch      make test-clients  timm's own tests over our models"
	@echo "make wheel       a wheel for every machine, and one with compiled CPU kernels, in dist/"
	@echo "make docs        the site, in build/site (minutes at first: it measures every model)"
	@echo "make lint        ruff, clang-format, pyright    make clean      remove the environment and what runs wrote"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,det,medical,video,generate,look,docs,shards,export,quantize,cuda,dev]"
	touch $@

quickstart: setup
	$(BIN)/python tools/quickstart.py

denoise: setup
	$(BIN)/python tools/denoise.py

segmentation: setup
	$(BIN)/python tools/scenes.py segmentation

detection: setup
	$(BIN)/python tools/scenes.py detection --no-comparison

test: setup
	$(PYTEST) $(TESTS)

test-fast: setup
	$(PYTEST) -m "not slow" $(TESTS)

test-newest: $(VENV)-newest/.installed
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n $(WORKERS) -m "not slow" $(TESTS)

$(VENV)-newest/.installed: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet -c constraints-newest.txt -e ".[train,det,medical,video,generate,look,docs,shards,export,quantize,dev]"
	touch $@

test-clients: setup
	$(BIN)/python tests/clients/timm_suite.py

docs: setup docs/zoo.html
	$(BIN)/mkdocs build --strict

docs/zoo.html: backbones/published.py tools/models.html tools/models.py benchmarks/cpu-2026-11-21.json | setup
	$(BIN)/linzoo models --html $@ --benchmark $(lastword $^)

wheel: setup
	rm -rf build ops/prebuilt
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m linzoo.ops.compile_cpu --prebuilt
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist \
		--config-settings=--build-option=--plat-name=$$($(BIN)/python -m linzoo.ops.compile_cpu --platform) .
	rm -rf build ops/prebuilt

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pyright

clean:
	rm -rf $(VENV) $(VENV)-newest build dist *.egg-info data work_dirs
