# Needs Python 3.11 or later and make; everything else goes into .venv.
# For CPU-only builds of torch set PIP_EXTRA_INDEX_URL to PyTorch's CPU index before the first target
# (or PIP_FIND_LINKS to a folder of wheels): pip reads both by itself.

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
STAGE := build/typecheck
ARGS  ?=
JOBS  ?= 2
# Workers begin with halves of the tests, not with every second one, so that what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
STAGES ?= vae unet export

.PHONY: help setup test test-all demo check lint types format bench bench-gpu train golden clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  ARGS='...' is passed on to pytest or to the script; JOBS=n sets pytest's workers."

setup: $(STAMP) ## Create .venv and install the package with all its tools

# --no-build-isolation, so that constraints.txt pins setuptools as well.
$(STAMP): pyproject.toml constraints.txt
	@python=; for candidate in $(PYTHON) python3.13 python3.12 python3.11 python3 python; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "make: no Python 3.11 or later found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then \
	    echo "Creating $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv $(VENV) || { echo "make: '$$python -m venv' failed; on Debian and Ubuntu install python3-venv" >&2; rm -rf $(VENV); exit 1; }; \
	fi
	@echo "Installing lightcache-fx and its tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,test,dev]'
	@touch $@

test: $(STAMP) ## Run the tests (ARGS='-k cache' is passed to pytest)
	@$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(STAMP) ## Run the slow tests too, which repeat the others on more models
	@$(PYTEST) $(ARGS)

demo: $(STAMP) ## Make one video, plain and accelerated, into out/demo
	@$(BIN)/python examples/demo.py --out out/demo $(ARGS)

check: lint types ## Lint, check the formatting, and type-check strictly

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy cannot follow setuptools' package-dir mapping, so the package is laid out here as it is installed:
# links to each module, and passes/ below them. New files are picked up because the links are made anew.
types: $(STAMP) ## Type-check lightcache_fx and passes as they are installed
	@rm -rf $(STAGE) && mkdir -p $(STAGE)/lightcache_fx
	@ln -s $(CURDIR)/lightcache_fx/* $(STAGE)/lightcache_fx/
	@ln -s $(CURDIR)/passes $(STAGE)/lightcache_fx/passes
	@cd $(STAGE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p lightcache_fx

format: $(STAMP) ## Rewrite the sources in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

golden: $(STAMP) ## Record the golden files again (read the diff before you commit it)
	@UPDATE_GOLDEN=1 $(PYTEST) $(ARGS)

bench: $(STAMP) ## Run benchmarks/denoise.py
	@$(BIN)/python -m benchmarks.denoise $(ARGS)

bench-gpu: $(STAMP) ## Measure on a GPU (CUDA) all that there is to measure; CPU results stay
	@$(BIN)/python -m benchmarks.denoise --device cuda --dtype float16 --full-size $(ARGS)
	@$(BIN)/python -m benchmarks.memory --device cuda --dtype float16 --full-size
	@$(BIN)/python -m benchmarks.systems --device cuda --full-size
	@$(BIN)/python -m benchmarks.swap_gpu
	@$(BIN)/python -m benchmarks.compile --device cuda --dtype float16 --full-size --parts loops --out benchmarks/results/compile-cuda.json
	@$(BIN)/python -m benchmarks.compile --device cuda --dtype float16 --full-size --parts loops --mode reduce-overhead \
	    --out benchmarks/results/compile-cuda-graphs.json
	@$(BIN)/python -m benchmarks.plans --out benchmarks/results/plans-cuda.json

train: $(STAMP) ## Train the small video model (resumes from its checkpoints; STAGES='unet export')
	@for stage in $(STAGES); do $(BIN)/python -m examples.small_model.train $$stage $(ARGS); done

clean: ## Remove what the targets made, except runs/ and .venv
	@rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find lightcache_fx passes tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
