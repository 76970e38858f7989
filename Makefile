# On a fresh machine: `make demo` pretrains a ConvMAE on photographs, `make test` runs the tests.
# Each target first makes a virtual environment, .venv, and installs and builds there what it needs.
PYTHON ?= python3
BIN := .venv/bin
CODE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)
SOURCES := $(CODE) setup.py
export CONVMAE_REQUIRE_EXT = 1
unexport PYTHONDONTWRITEBYTECODE  # tests start hundreds of processes, which would all compile the same modules

.PHONY: demo fashion-mnist fashion-mnist-small stamps emoji test test-thorough coverage compat wheel lint docs bench gpu build clean

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
	$(BIN)/convmae pretrain --config recipes/demo.yaml --output_dir runs/demo
	$(BIN)/python -m benchmarks --case step --summary --model convmae_tiny --batch_size 8 --img_size 96

# Real pictures with labels (MIT licence), from a package of Debian and Ubuntu; not installed.
fashion-mnist: data/fashion-mnist
data/fashion-mnist:
	mkdir -p data/package
	cd data/package && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .
	mv data/package/usr/share/datasets/fashion-mnist data/fashion-mnist
	rm -rf data/package

# The first 6,000 pictures of it to train on, and 2,000 to test on.
fashion-mnist-small: data/fashion-mnist-small
data/fashion-mnist-small: | data/fashion-mnist .venv/installed
	$(BIN)/python -m examples.part_of_idx data/fashion-mnist $@ --train 6000 --val 2000

# Cut-outs and photographs to compose pictures of (licences: docs/composed_pictures.md), from packages
# of Debian, 320 MB; not installed.
STAMPS := tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers lomiri-wallpapers-16.04
stamps: data/stamps
data/stamps: | .venv/installed
	rm -rf data/stamps_packages && mkdir -p data/stamps_packages
	cd data/stamps_packages && apt-get download $(STAMPS) && for name in $(STAMPS); do \
		dpkg -x $${name}_*.deb $$name || exit 1; done
	$(BIN)/python examples/choose_stamps.py data/stamps_packages data/stamps
	rm -rf data/stamps_packages

# The same emoji by four drawers (licences: docs/does_it_work.md), from packages of npm, 246 MB; needs no npm.
emoji: data/emoji
data/emoji: | .venv/installed
	$(BIN)/python examples/fetch_emoji.py data/emoji

test: build
	$(BIN)/pytest -n 3 --dist worksteal

# The long ones too: more cases of what `make test` tests. For a release, or where one has changed something.
test-thorough: build
	$(BIN)/pytest -n 2 --dist worksteal --thorough

# Which lines the tests run, processes that they start included; takes twice as long as the tests.
coverage: build
	$(BIN)/pytest -n 2 --dist worksteal -q --cov --cov-report=term:skip-covered

# make compat TORCH=2.11.0 PYTHON=python3.12: the tests under another torch, see docs/compatibility.md
# make compat WHEEL=dist/NAME.whl TORCH=...: the kernels' tests of a wheel, without a compiler
compat:
	@$(PYTHON) tests/support/compat.py "$(TORCH)" --workers $(or $(WORKERS),2) $(if $(WHEEL),--wheel "$(WHEEL)")

# The files of a release, in dist/: see docs/releasing.md. Takes half an hour on one core.
wheel: .venv/release
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m release.build $(if $(ARCHS),--archs "$(ARCHS)")

.venv/release: .venv/installed
	$(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['release'])" \
		| xargs $(BIN)/pip install --quiet -c constraints.txt
	touch $@

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CODE) $(wildcard tests/simt/*.cpp tests/simt/*.h tests/simt/*.cuh)

# The documentation site, in build/docs/index.html; needs no compiled library. A warning is an error: so
# is a link to a page, a heading or a picture that is not there. Links to other sites are not tried.
docs: .venv/installed
	$(BIN)/sphinx-build -E -W --keep-going -q -b html docs build/docs

bench: build
	$(BIN)/python -m benchmarks

# On a machine with a GPU and its own PyTorch: no virtual environment, nothing installed.
gpu:
	bash benchmarks/gpu.sh $(STAGES)

clean:
	rm -rf .venv .venv-compat build dist *.egg-info convmae_kernels/_C.so
