# `make` shows the targets.
.DEFAULT_GOAL := help
SHELL := /bin/sh

# The first Python of these that is new enough; `make setup PYTHON=...` names another.
PYTHON ?= $(shell for python in python3 python3.12 python3.13 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
ENGINE ?= auto
MODEL ?= gemma
SCENARIO ?= all
NODES ?= 20
SEED ?= 1
VERSIONS ?= 0.29.0 0.30.0 0.31.0
OLDEST := $(firstword $(VERSIONS))
TESTS ?= not soak and not slow and not topology
ARGS ?=
BIN := .venv/bin

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-13s %s\n", $$1, $$2 }'
	@echo
	@echo "  Options: PYTHON=python3.12  ENGINE=auto|cpu|gpu  MODEL=gemma|tiny  ARGS='...' (handed to pytest, demo, sim, bench)"

.PHONY: setup
setup: ## Create .venv with vLLM and this project, and prepare the models (quick when repeated)
	@test -n "$(PYTHON)" || { echo "Hyperspace needs Python 3.11 or newer, and no python3 here is." \
		"Install one (sudo apt-get install -y python3 python3-venv), or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) deploy/setup --engine $(ENGINE) $(SETUP_ARGS)

.PHONY: demo
demo: setup ## Show two vLLM servers that share a prefix, with sources and times (MODEL=tiny: random weights, faster)
	@$(BIN)/python -m bench.demo --model $(MODEL) $(ARGS)

.PHONY: test
test: SETUP_ARGS = --tests --releases $(OLDEST)
test: setup ## Run all tests except slow, topology and soak tests (TESTS="not soak and not vllm": no real servers)
	@$(BIN)/python -m pytest -m "$(TESTS)" $(ARGS)
	@$(BIN)/python -m tests.releases $(OLDEST) -m "feature and not topology and not slow" tests/end_to_end/test_serve.py tests/vllm_adapter/test_older_vllm.py tests/vllm_adapter/test_neutral.py tests/core/response/test_request_key.py

.PHONY: test-vllm
test-vllm: SETUP_ARGS = --releases $(VERSIONS)
test-vllm: setup ## Run the end-to-end tests with other vLLM releases (VERSIONS="0.29.0 0.31.0": one environment each)
	@$(BIN)/python -m tests.releases $(VERSIONS) $(ARGS)

.PHONY: support-table
support-table: setup ## Copy the recorded results for releases and features into docs/operations.md
	@$(BIN)/python -m tests.support_table

.PHONY: test-all
test-all: ## Run every test: `make test`, slow, topology and soak tests, and every supported vLLM release (hours)
	@$(MAKE) --no-print-directory test TESTS=
	@$(MAKE) --no-print-directory test-vllm

.PHONY: check
check: setup ## Check formatting, lint, types, layers and architecture (under a minute)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd deploy/setup && ../../$(BIN)/mypy --config-file ../../pyproject.toml .
	$(BIN)/lint-imports
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m pytest -q tests/test_repository.py

.PHONY: format
format: setup ## Format Python and C++ as `make check` requires
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

.PHONY: sim
sim: setup ## Simulate a network of nodes (SEED=123 SCENARIO=liars_20pct NODES=20; the same seed replays the same run)
	@$(BIN)/hyperspace sim --scenario $(SCENARIO) --nodes $(NODES) --seed $(SEED) $(ARGS)

.PHONY: sim-full
sim-full: setup ## Run all scenarios with 100 nodes and 50 seeds on all cores (about three CPU-hours), into build/sim.json
	@$(BIN)/hyperspace sim --nodes 100 --seed $(SEED) --seeds 50 --output build/sim.json $(ARGS)

.PHONY: bench
bench: SETUP_ARGS = --bench
bench: setup ## Measure time to first token (cold, from the network, from the response cache), then the erasure code
	@$(BIN)/python -m bench.ttft --model $(MODEL) $(ARGS)
	@$(MAKE) --no-print-directory bench-erasure ARGS=

.PHONY: bench-responses
bench-responses: setup ## Measure the response cache and its limits (ARGS=--peers: compared with LiteLLM and GPTCache)
	@$(BIN)/python -m bench.response_cache $(ARGS)

.PHONY: bench-erasure
bench-erasure: SETUP_ARGS = --bench
bench-erasure: setup ## Measure commitments and the erasure code, compared with ISA-L, zfec and others; fail if a ratio is missed
	@$(BIN)/python -m bench.anchors
	@$(BIN)/python -m bench.commitment
	@$(BIN)/python -m bench.erasure --check $(ARGS)

.PHONY: bench-gpu
bench-gpu: setup ## Measure the CUDA kernels on this machine's GPU, and their cost to a decoding model (MODEL=none: skip that)
	@$(BIN)/python -m bench.gpu --model $(MODEL) $(ARGS)

.PHONY: cuda
cuda: setup ## Compile the CUDA kernels for sm_80, sm_90 and sm_100 (nvcc, no GPU) and count their instructions
	@PATH="$(BIN):$$PATH" cmake -S csrc -B build/cuda -DHYPERSPACE_CUDA=ON -DCMAKE_BUILD_TYPE=Release \
		-Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)" -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python"
	@PATH="$(BIN):$$PATH" cmake --build build/cuda --parallel 2 --target hyperspace_cuda
	@$(BIN)/python -m bench.cuda_static $(ARGS)

.PHONY: sanitize
sanitize: setup ## Run the native self-tests, including GPU kernels on the CPU, under AddressSanitizer and UBSan
	@$(BIN)/cmake -S csrc -B build/sanitize -DHYPERSPACE_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	@$(BIN)/cmake --build build/sanitize --parallel 2 --target selftest selftest_cuda
	./build/sanitize/selftest
	./build/sanitize/selftest_cuda

.PHONY: test-neon
test-neon: ## Run the native self-test for 64-bit ARM in an emulator (needs g++-aarch64-linux-gnu and qemu-user)
	@PATH="$(BIN):$$PATH" cmake -S csrc -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/csrc/cmake/aarch64.cmake \
		-DCMAKE_BUILD_TYPE=Release
	@PATH="$(BIN):$$PATH" cmake --build build/aarch64 --target run_selftest

.PHONY: transcripts
transcripts: setup ## Write into tests/core/*/transcripts what the machines do now; the diff shows what a change does
	@$(BIN)/python -m tests.support.machines.transcripts

.PHONY: fuzz
fuzz: setup ## Fuzz every decoder for a minute (ARGS='--seconds 600'; guided by coverage if atheris is installed)
	@$(BIN)/python -m tests.fuzz_decoders $(ARGS)

.PHONY: clean
clean: ## Remove build outputs and caches
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Remove build outputs, caches, .venv, .venvs and .models
	rm -rf .venv .venvs .models
