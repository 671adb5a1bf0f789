# make setup | train | test | test-long | bench | wheel | lint | format | docs   STACK=forks (default) or upstream: see docs/install.md
STACK  ?= forks
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= $(if $(filter upstream,$(STACK)),.venv-upstream,.venv)

BIN       := $(VENV)/bin
STACK_OK  := $(VENV)/.stack-installed
PLUGIN_OK := $(VENV)/.plugin-installed
# MMCV_OPS=1 compiles mmcv's own operators (10 minutes on two cores); without it, msda_plugin provides them.
OPS_OK    := $(if $(filter 1,$(MMCV_OPS)),$(VENV)/.mmcv-ops-compiled)
MMCV      := $(shell grep mmcv requirements/$(STACK).txt)
NO_DEPS   := $(wildcard requirements/no-deps-$(STACK).txt)

CONFIG   := configs/shapes/rtdetr_r18vd-nano_1xb4-7e_shapes.py
DATA     ?= data/shapes
WORK_DIR ?= work_dirs/shapes$(if $(filter upstream,$(STACK)),-upstream)

ifeq ($(STACK),forks)
  MMDET := onedl-mmdetection
else ifeq ($(STACK),upstream)
  MMDET := mmdet
else
  $(error STACK=$(STACK) is not known: use STACK=forks or STACK=upstream)
endif

# Trainings that the tests start share the cores with the other tests: one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: setup train test test-long bench wheel lint format lint-tools docs clean
setup: $(PLUGIN_OK) $(OPS_OK)

# torch comes first and alone, and nothing that needs it is built in isolation: pip would fetch another torch for the build.
# mmcv is built in isolation on purpose: without torch it compiles no operators. pip's cache may hold a compiled mmcv.
$(STACK_OK): requirements/build.txt requirements/$(STACK).txt $(NO_DEPS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'msda_plugin needs Python 3.10 or newer; name one: make setup PYTHON=python3.11'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/python -m pip install -q -r requirements/build.txt
	$(BIN)/python -m pip install -q --no-deps --no-cache-dir $(MMCV)
	$(BIN)/python -m pip install -q --no-build-isolation -r requirements/$(STACK).txt
	$(if $(NO_DEPS),$(BIN)/python -m pip install -q --no-build-isolation --no-deps -r $(NO_DEPS))
	@touch $@

$(PLUGIN_OK): $(STACK_OK) setup.py pyproject.toml $(shell find csrc -type f -not -name '*.pyc')
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[test]'
	$(BIN)/python -m msda_plugin mmcv-ops install
	@touch $@

$(OPS_OK): $(STACK_OK) | $(PLUGIN_OK)
	$(BIN)/python -m msda_plugin mmcv-ops remove
	$(BIN)/python -m pip uninstall -q -y mmcv-lite
	$(BIN)/python -m pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir $(subst mmcv-lite,mmcv,$(MMCV))
	@touch $@

train: setup  # always the shapes; another config: python -m msda_plugin train CONFIG
	$(BIN)/python -m msda_plugin shapes --out $(DATA)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mim train $(MMDET) $(CONFIG) --work-dir $(WORK_DIR) \
	  --cfg-options data_root=$(DATA)/

test: setup
	$(PYTEST) -m 'not slow' $(ARGS)

test-long: setup  # what `make test` leaves out: full builds, launchers, long trainings
	$(PYTEST) -m slow $(ARGS)

bench: setup
	$(BIN)/python -m msda_plugin benchmark op

WHEEL_ENV := build/wheel-env
wheel:  # dist/: the sdist, and the wheel built from it with the CPU library and CUDA libraries for CUDA 12 and 13
	rm -rf build/wheel dist && mkdir -p build/wheel
	test -x $(WHEEL_ENV)/bin/python || $(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -m pip install -q --no-deps '$(TORCH)' -r requirements/wheel.txt
	NVCC="$${NVCC:-$$($(WHEEL_ENV)/bin/python csrc/toolkits.py build/cuda)}" MSDA_BUILD_CUDA=1 \
	  $(WHEEL_ENV)/bin/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(WHEEL_ENV)/bin):$$PATH" auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# Not docs/api: mkdocstrings reads indented options, which mdformat would join to a paragraph.
MARKDOWN  = $(BIN)/mdformat --wrap 120 --compact-tables $$(git ls-files '*.md' ':!docs/api')
CPP_FILES = $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

lint: lint-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(MARKDOWN) --check

format: lint-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)
	$(MARKDOWN)

lint-tools: setup
	$(BIN)/python -m pip install -q -r requirements/lint.txt

docs: setup  # the pages, in build/site
	$(BIN)/python -m pip install -q -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist *.egg-info msda_plugin/ops/lib $(PLUGIN_OK)
