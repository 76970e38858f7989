# On a fresh machine: `make demo` pretrains a ConvMAE on photographs, `make test` runs the tests.
# Each target first makes a virtual environment, .venv, and installs and builds there what it needs.
PYTHON ?= python3
BIN := .venv/bin
CODE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)
SOURCES := $(CODE) setup.py
export CONVMAE_REQUIRE_EXT = 1

.PHONY: demo test lint bench gpu build clean

.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision setuptools wheel ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[train,dev]"
	touch $@

convmae_kernels/_C.so: $(SOURCES) .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

build: convmae_kernels/_C.so

# Eight photographs, nearly whole, for three minutes: enough to learn them by heart.
DEMO_SIZE = --model convmae_tiny --batch_size 8
DEMO_RUN = --data_path demo --input_size 96 --min_crop 0.9 --hflip 0 --epochs 18 \
	--warmup_epochs 1 --lr 1e-3 --clip_grad 1 --save_every 6

demo: build
	rm -rf runs/demo
	$(BIN)/convmae pretrain $(DEMO_SIZE) $(DEMO_RUN) --output_dir runs/demo
	$(BIN)/python -m benchmarks --case step --summary $(DEMO_SIZE) --img_size 96

test: build
	$(BIN)/pytest -n 2 --dist worksteal

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CODE) $(wildcard tests/simt/*.cpp tests/simt/*.h tests/simt/*.cuh)

bench: build
	$(BIN)/python -m benchmarks

# On a machine with a GPU and its own PyTorch: no virtual environment, nothing installed.
gpu:
	bash benchmarks/gpu.sh $(STAGES)

clean:
	rm -rf .venv build *.egg-info convmae_kernels/_C.so
