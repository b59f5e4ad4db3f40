# make run · make test · make gpu-proof · make lint · make bench · make study
# Everything happens in a virtual environment under .venv; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the extensions and the metadata are made of: touching one of them installs again.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
TORCH := 2.13.0

.PHONY: run test gpu-proof lint bench study clean

run: $(VENV)/.installed
	$(BIN)/drift run configs/quickstart.yaml

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# The GPU kernels without a GPU: Triton's in its interpreter, and compiled for three architectures.
gpu-proof: $(VENV)/.gpu-proof
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu_proof

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=min,median,rounds -q
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.sweeps

study: $(VENV)/.installed
	$(BIN)/drift study configs/study.yaml

# torch first: where there is no CUDA, its CPU build (a plain "torch" may be a CUDA build of several GB).
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install torch; else \
	  $(BIN)/pip install "torch==$(TORCH)+cpu" || \
	  $(BIN)/pip install "torch==$(TORCH)" --index-url https://download.pytorch.org/whl/cpu; fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -e ".[lora]"
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -e ".[lora,dev]"
	@touch $@

$(VENV)/.gpu-proof: $(VENV)/.dev
	$(BIN)/pip install -e ".[lora,dev,triton]"
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install -e ".[lora,bench]"
	-$(BIN)/pip install --no-deps verl==0.9.1  # its own requirements are not needed for its loss
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find drift drift_kernels -name '*.so' -delete
