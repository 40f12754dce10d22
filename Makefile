# Everything a person or a CI machine does here. `make help` lists the targets.
#
# Nothing has to be installed beforehand but Python 3.11 or newer and, for the emulator's tests, g++.

PYTHON ?= python3
VENV := .venv/bin
REPO_ID := flash-attn-4-org/flash-attn-4
# Options for pytest, as in: make test PYTEST="-k causal"
PYTEST ?=
# Options of the emulator, as in: make emulate ARGS="--arch sm120a --causal"; --help lists them
# of the fuzzer, as in: make fuzz ARGS="--backend cuda --cases 2000 --shards 16"
# and of publish: make publish REPO=org/flash-attn-4 ARGS=--execute
ARGS ?=

.PHONY: help setup build publish demo test test-vllm test-gpu emulate timing fuzz lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

setup: ## create .venv with all that developing needs
	@$(PYTHON) scripts/setup_env.py dev

build: ## compile the shipped kernels and assemble build/torch-cuda and build/torch-cpu
	@$(PYTHON) scripts/setup_env.py build
	@OMP_NUM_THREADS=1 $(VENV)/python -m flash_attn4_cute.build --variants all

publish: ## say what would be published as REPO=org/flash-attn-4; ARGS=--execute publishes it
	@$(PYTHON) scripts/setup_env.py demo
	@$(VENV)/python -m flash_attn4_cute.build.publish "$(REPO)" $(ARGS)

demo: ## generate text with a language model, once with this kernel and once with eager attention
	@$(PYTHON) scripts/setup_env.py demo && $(VENV)/python -m flash_attn4_cute.build \
		|| { echo "demo: FAILED setting up or building, see above"; exit 1; }
	@LOCAL_KERNELS="$(REPO_ID)=$(CURDIR)/build" $(VENV)/python examples/generate.py

# The emulator's tests put an emulated CUDA runtime under their process, so they run by themselves.
# Status 5 is pytest's for no test, which a choice by PYTEST may leave to either run.
RUN_TESTS = OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n 2 --dist worksteal --timeout 900
MAY_BE_EMPTY = $(if $(PYTEST),|| [ $$? -eq 5 ])

test: ## run every test that needs no GPU
	@$(PYTHON) scripts/setup_env.py test
	@$(RUN_TESTS) -m "not gpu" $(PYTEST) $(MAY_BE_EMPTY)
	@$(RUN_TESTS) tests/emulator $(PYTEST) $(MAY_BE_EMPTY)

test-vllm: ## run the tests of the plugins for vLLM and SGLang, in an environment of their own
	@$(PYTHON) scripts/setup_env.py vllm
	@OMP_NUM_THREADS=1 .cache/vllm-venv/bin/python -m pytest tests/sglang tests/vllm --timeout 900 $(PYTEST)

test-gpu: ## run every test that needs a CUDA GPU, with the Python named by PYTHON
	$(PYTHON) -m pytest -m gpu $(PYTEST)

emulate: ## run a kernel on an emulated card and compare it with float64, with the options in ARGS
	@$(PYTHON) scripts/setup_env.py test
	@OMP_NUM_THREADS=1 $(VENV)/python -m ptx_emulator $(ARGS)

timing: ## predict how fast the tcgen05 kernels are; tables, and plots in build/timing
	@$(PYTHON) scripts/setup_env.py timing
	@OMP_NUM_THREADS=1 $(VENV)/python -m ptx_emulator.timing $(ARGS)

fuzz: ## search for wrong answers at random, with the options in ARGS; --help lists them
	@$(PYTHON) scripts/setup_env.py test
	@OMP_NUM_THREADS=1 $(VENV)/python -m tests.fuzz $(ARGS)

lint: ## ruff, ruff format and mypy, as CI and pre-commit run them
	@$(PYTHON) scripts/setup_env.py lint
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@rm -rf .cache/staged && $(VENV)/python -m flash_attn4_cute.build --stage .cache/staged
	@$(VENV)/mypy

clean: ## remove what was generated, but for .venv and .cache
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
