# On a fresh machine: `make demo` pretrains a ConvMAE on photographs, `make test` runs the tests.
# Each target first makes a virtual environment, .venv, and installs and builds there what it needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h) setup.py
export CONVMAE_REQUIRE_EXT = 1

.PHONY: demo test lint bench build clean

.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision setuptools wheel ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[train,dev]"
	touch $@

convmae_kernels/_C.so: $(SOURCES) .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

build: convmae_kernels/_C.so

demo: build
	rm -rf runs/demo
	$(BIN)/convmae pretrain --data_path demo --model convmae_tiny --output_dir runs/demo $(DEMO)
	$(BIN)/python -m benchmarks --case step --model convmae_tiny --summary

test: build
	$(BIN)/pytest -n 2 --dist worksteal

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

bench: build
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info convmae_kernels/_C.so
