# Entry points for a checkout. Every target sets itself up; a second run spends no time on it.
#   make demo   the main job: a text-to-video workflow, dense and accelerated, side by side
#   make test   linters, types and every test that can run here
#   make quick  the part of it that needs no ComfyUI and takes seconds each
#   make gpu    kernel checks and speed on a CUDA GPU
#   make lint   linters and types only
#   make bench  the CPU benchmarks: kernels, and the patch's own cost
#   make mutants  planted faults that the tests must find: hours; MODULES="path ..." for some

SHELL := /bin/bash
SYSTEM_PYTHON ?= python3
# The first Python of a supported version.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$python && break; done)
PACKAGE := .pkg/tessera
VENV := .venv/.ready-$(shell cat requirements.txt requirements-dev.txt | sha256sum | cut -c1-16)

# .pkg holds one link, `tessera` -> the repository. The repository itself must never be on the path: its
# `nodes` folder would hide ComfyUI's own module of that name.
export PYTHONPATH := $(CURDIR)/.pkg

# A machine that brings torch and triton (a bare GPU box without network) is used as it is.
SYSTEM_READY = $(SYSTEM_PYTHON) -c "import torch, triton" 2>/dev/null

.PHONY: demo test quick lint gpu bench mutants clean

demo: $(VENV)
	.venv/bin/python -m tessera demo

# A process a core of the smallest machine; each starts the servers that its files need. One thread each, in the servers too.
test: $(VENV) lint
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile

quick: $(VENV) lint
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile -m "not comfy and not browser and not slow"

lint: $(VENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	MYPYPATH=.pkg .venv/bin/mypy -p tessera

gpu: $(PACKAGE)
	@if $(SYSTEM_READY); then python=$(SYSTEM_PYTHON); else $(MAKE) $(VENV) && python=.venv/bin/python; fi; \
	status=0; \
	if $$python -c "import pytest" 2>/dev/null; then \
		$$python -m pytest -m gpu $$(grep -l "mark.gpu" tests/test_*.py) || status=$$?; \
	else echo "pytest is not installed: the GPU tests were skipped, the benchmark checks its kernels itself"; fi; \
	$$python bench/gpu_attention.py --minutes 5 || status=$$?; \
	$$python bench/gpu_offload.py --minutes 2 || status=$$?; \
	exit $$status

bench: $(VENV)
	.venv/bin/python bench/cpu_attention.py
	.venv/bin/python bench/patch_overhead.py

mutants: $(VENV)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check cosmic-ray==8.7.0
	.venv/bin/python bench/mutants.py $(MODULES)

$(PACKAGE):
	mkdir -p .pkg && ln -sfn .. $@

$(VENV): | $(PACKAGE)
	@test -n "$(PYTHON)" || { echo "Tessera needs Python 3.10, 3.11 or 3.12: install one, or name it with make PYTHON=..."; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	rm -f .venv/.ready-*
	touch $@

clean:
	rm -rf .venv .pkg .pytest_cache .mypy_cache .ruff_cache .hypothesis
