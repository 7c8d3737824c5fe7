# Each target sets up what it needs: a virtual environment in .venv with torch, the package and
# its development tools. Another torch: make test TORCH=torch==2.10.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

PY := $(VENV)/bin/python
TORCH_READY := $(VENV)/.torch-$(subst =,-,$(subst /,-,$(TORCH)))
READY := $(VENV)/.ready
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-seeds test reliability scale aot sanitize bench bench-kernels lint types imports check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 15

setup: $(READY)  ## make the environment and build the native extension

demo: $(READY)  ## train, distil and evaluate on the grammar task, about 10 minutes on 2 cores
	$(PY) -m dlmone_fast.train --preset grammar --output-dir runs/demo --resume never

demo-seeds: $(READY)  ## the demo for the seeds 1, 2 and 3, held against what it promises
	$(PY) -m benchmarks.demo_seeds

test: $(READY)  ## run the tests, 10 minutes on 2 cores
	$(PY) -m pytest tests -q -n logical --maxprocesses 4 --dist loadfile

# Where atheris cannot be installed, files are fuzzed without coverage, and the table says so.
# The table is for a failed campaign too, and its command says how the campaign ended.
reliability: $(READY)  ## try to break everything, about 40 minutes on 2 cores; writes docs/reliability.md
	-$(PY) -m pip install --disable-pip-version-check -q -e ".[fuzz]"
	-.ci/sanitize $(PY)
	rm -f build/reliability.json
	-$(PY) -m pytest tests/reliability -q --campaign --figures build/reliability.json
	$(PY) -m benchmarks.reliability build/reliability.json

scale: $(READY)  ## ranks, bulk generation and serving, tested, timed and loaded; 30 minutes on 2 cores; writes docs/scaling.md
	$(PY) -m pytest tests/training/test_ranks.py tests/training/test_ranks_compiled.py --campaign -q
	$(PY) -m pytest tests/bulk tests/serving -q
	$(PY) -m benchmarks.ranks
	$(PY) -m benchmarks.serving

aot: $(READY)  ## compile every Triton kernel for A100 and H100, without a GPU
	$(PY) -m dlmone_fast.kernels.triton.aot --jobs 2

sanitize: $(READY)  ## run the native code's tests under AddressSanitizer and UBSan
	.ci/sanitize $(PY)

bench: $(READY)  ## time everything beside its peers, under 15 minutes on 2 cores; BENCH=--full for all
	$(PY) -m pip install --disable-pip-version-check -q -e ".[bench]"
	$(PY) -m pytest benchmarks --benchmark-only --save-records $(BENCH)
	$(PY) -m benchmarks.report

bench-kernels: $(READY)  ## time the kernels alone, on a GPU if there is one
	$(PY) -m pytest benchmarks --benchmark-only -k kernels --save-records

lint: $(READY)  ## check style: ruff, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

types: $(READY)  ## check types: mypy
	$(VENV)/bin/mypy

imports: $(READY)  ## check the layers: import-linter
	$(VENV)/bin/lint-imports

check: lint types imports  ## lint, types and imports

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info dlmone_fast/_C*.so dlmone_fast/_native_build.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dlmone_fast needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A CUDA build of torch brings the triton it was built for. A CPU build brings none: 3.7.1 is the
# one that torch 2.13 was built for, and later versions drop interfaces that kernels use.
$(TORCH_READY): | $(PY)
	$(PY) -m pip install --disable-pip-version-check "$(TORCH)"
	@[ "$$(uname -sm)" != "Linux x86_64" ] || $(PY) -c 'import triton' 2>/dev/null || \
	  $(PY) -m pip install --disable-pip-version-check triton==3.7.1
	rm -f $(VENV)/.torch-* && touch $@

$(READY): $(TORCH_READY) pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(PY) -m pip install --disable-pip-version-check -e ".[dev]"
	touch $@
