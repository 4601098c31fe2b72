# What a contributor does, each in one word. Everything is installed into $(VENV), at the versions in constraints.txt,
# once: a stamp file per extra says what is there, and is out of date when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
# A release of torch to test with instead of the one in constraints.txt, in an environment of its own.
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
# Processes and strategy of `make train`, and what `train`, `test`, `bench` and `chaos` hand on to their command.
NPROC ?= 2
STRATEGY ?= ddp
# Where `make dist` puts the wheel and the source archive.
DIST ?= dist
ARGS ?=

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
# A half-made environment must not look like a whole one, and two pips must not write into one environment.
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help train test test-core test-wheel test-net test-slurm test-soak test-resume test-docs test-image lint lint-deploy format docs bench chaos hooks dist dev clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  make train ARGS="trainer.epochs=3"     hands ARGS on; so do test, bench and chaos'
	@echo '  make train NPROC=4 STRATEGY=ddp        more processes, another strategy'
	@echo '  make test PYTHON=python3.12            which Python makes the environment (only the first time)'
	@echo '  make test TORCH=2.14.1                 another torch, in an environment of its own; so do all targets'

train: $(VENV)/.stamp-digits ## Train a CNN on real images under two data-parallel processes
	$(BIN)/torchrun --nproc-per-node $(NPROC) launch/train.py strategy=$(STRATEGY) $(ARGS)

test: $(VENV)/.stamp-test ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

# What depends on torch most: process groups, strategies, gradients, compression, optimizers and checkpoints.
CORE := tests/test_torch_internals.py tests/runtime/test_runtime.py tests/runtime/test_device.py \
	tests/communication/test_collectives.py tests/gradients tests/compression tests/optim tests/models/test_tensors.py \
	tests/strategies/test_single.py tests/strategies/test_ddp.py tests/strategies/test_batchnorm.py \
	tests/strategies/test_precision.py tests/strategies/pipeline/test_strategy.py tests/strategies/local_sgd \
	tests/checkpoint tests/training/test_resume.py tests/training/test_resume_compatibility.py tests/training/test_trainer.py

test-core: $(VENV)/.stamp-test ## Run the tests of what depends on torch most (minutes), with TORCH=2.6.0 for example
	$(BIN)/python -m pytest $(CORE) $(ARGS)

test-wheel: $(VENV)/.stamp-test ## Check that installing the wheel leaves the torch that is there, with TORCH=2.15.0 for example
	rm -rf $(VENV)/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(VENV)/wheel .
	$(BIN)/python -m pip install --dry-run $(VENV)/wheel/distrain-*.whl >$(VENV)/wheel/would_install.txt
	$(BIN)/python -c 'import torch; print("installed: torch", torch.__version__)'
	@grep 'Would install' $(VENV)/wheel/would_install.txt
	@! grep -E 'Would install.* torch-[0-9]' $(VENV)/wheel/would_install.txt >/dev/null || { echo 'installing the wheel would replace torch' >&2; exit 1; }

test-net: $(VENV)/.stamp-test ## Run jobs under torchrun on several hosts of a test network (Linux, root)
	DISTRAIN_TEST_NET=1 $(BIN)/python -m pytest tests/multinode $(ARGS)

test-slurm: $(VENV)/.stamp-test ## Train under a SLURM cluster of two nodes on this machine (needs slurm-wlm and munge)
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

test-soak: $(VENV)/.stamp-test ## Train hundreds of times, for faults that few runs show (an hour and a half on two cores)
	$(BIN)/python -m pytest -m soak $(ARGS)

test-resume: $(VENV)/.stamp-test ## Resume each layout of ranks from the checkpoint of each other one (three minutes)
	$(BIN)/python -m pytest -m soak tests/training/test_resume_matrix.py $(ARGS)

test-docs: $(VENV)/.stamp-test ## Run the commands of the documentation as they stand there, with short settings
	$(BIN)/python -m pytest -m docs tests/website $(ARGS)

test-image: ## Build both images without a daemon, train in one and serve by the other (needs root, buildah and debootstrap)
	docker/try_image.sh

lint: $(VENV)/.stamp-lint ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-deploy: $(VENV)/.stamp-deploy ## Check Dockerfile, manifests and batch scripts
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck launch/slurm/train.sbatch docker/try_image.sh
	$(BIN)/kubernetes-validate --strict --kubernetes-version 1.31.0 launch/kubernetes/*.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

docs: $(VENV)/.stamp-docs ## Build the documentation site in site/, and check it
	$(BIN)/python -m website.build

format: $(VENV)/.stamp-lint ## Format the code and fix what can be fixed by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-bench ## Measure distrain against a bare loop and its peers
	$(BIN)/python benchmarks/step.py --no-phases $(ARGS)

# A sixth of the faults each.
chaos: $(VENV)/.stamp-digits ## Hurt six kinds of trainings 100 times and compare them with undisturbed ones
	$(BIN)/python launch/chaos.py faults=100 $(ARGS) \
		-- experiment=chaos strategy=ddp \
		-- experiment=chaos strategy=pipeline \
		-- experiment=chaos strategy=fsdp \
		-- experiment=chaos strategy=mesh strategy.mesh.tensor=2 \
		-- experiment=chaos strategy=ddp compression=powersgd \
		-- experiment=chaos strategy=local_sgd strategy.sync_every=7

hooks: $(VENV)/.stamp-lint ## Check every commit before it is made
	$(BIN)/pre-commit install

dist: $(VENV)/.stamp-dist ## Build the wheel and the source archive, and check both
	rm -rf $(DIST)
	$(BIN)/python -m build --no-isolation --outdir $(DIST) .
	$(BIN)/python -m twine check --strict $(DIST)/*
	$(BIN)/check-wheel-contents $(DIST)/*.whl

dev: $(VENV)/.stamp-dev ## Install everything and run nothing

clean: ## Remove the environment and what was built or cached; runs and data sets stay
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
	if [ -f '$(VENV)/pyvenv.cfg' ]; then rm -rf '$(VENV)'; fi

# The Python is checked first: pip would refuse it too, but only once the environment is made with it.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v[:2] <= (3, 13) else "distrain needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)

# The name of the stamp is the name of the extra. Only the environment's existence counts, not its date.
$(VENV)/.stamp-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@

# For another torch: without the versions of what torch itself chooses. Not with pip's -c alone, which knows no exception.
ifneq ($(TORCH),)
$(CONSTRAINTS): constraints.txt | $(VENV)/pyvenv.cfg
	grep -vE '^(torch|triton|sympy|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' constraints.txt >$@
	echo 'torch==$(TORCH)' >>$@
endif
