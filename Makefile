# The two commands a newcomer types, and what they need. Everything is installed into .venv, nothing elsewhere.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow gpu lint wheel wheels test-oldest test-newest clean

# Teacher, cache, recalibration, 4-bit student, report: the whole method on a generated task, on a CPU.
demo: $(INSTALLED)
	$(BIN)/first-trl demo

# The default test suite: no network, no data but its own.
test: $(INSTALLED)
	$(BIN)/python -m pytest

# Minutes of work each: many kills of a caching run, a browser, and the like.
slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# On a machine with a GPU, without a network: its tests, a training step, caching, the demo; results in benchmarks/results.
# `make gpu REHEARSE=--rehearse` runs the same parts with tiny sizes on a CPU.
gpu: $(INSTALLED)
	PYTHON=$(BIN)/python bash benchmarks/gpu.sh $(REHEARSE)

# What such a machine lacks beside torch and transformers, as wheels for its Python (GPU_PYTHON), below 60 MB in all.
# There: `python3 -m pip install --no-index --no-deps wheels/*.whl`, then `PYTHON=python3 bash benchmarks/gpu.sh`.
GPU_PYTHON ?= 3.12
GPU_WHEELS := trl datasets bitsandbytes dill multiprocess pydantic pydantic_core annotated-types typing-inspection
wheels: $(INSTALLED)
	rm -rf wheels && mkdir wheels
	for name in $(GPU_WHEELS); do \
	    pin=$$(grep -i "^$$name==" constraints.txt || echo $$name); \
	    $(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	        --implementation cp $(foreach n,2_28 2_27 2_24 2_17,--platform manylinux_$(n)_x86_64) \
	        --platform manylinux2014_x86_64 --dest wheels $$pin || exit 1; \
	done
	@du --bytes wheels/*.whl | sort -n
	@total=$$(du --bytes --total wheels/*.whl | tail -1 | cut -f1); echo "$$total bytes in all"; test $$total -lt 60000000

# The ends of the ranges in pyproject.toml: the oldest and the newest releases that it admits; torch stays as pinned.
test-oldest test-newest: test-%:
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-$*/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PYTHON) benchmarks/ranges.py $* > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/python -m pip install --quiet --constraint $(VENV)-$*/constraints.txt --editable ".[dev]"
	$(VENV)-$*/bin/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The packages as they are released: built, and the wheel installed into an empty environment outside this folder, where
# the demo must run.
wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	elsewhere=$$(mktemp -d) && $(PYTHON) -m venv $$elsewhere/venv \
	&& $$elsewhere/venv/bin/pip install --quiet --constraint constraints.txt torch \
	&& $$elsewhere/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl \
	&& cd $$elsewhere && venv/bin/first-trl demo

# torch first and by itself: pinned, it is one build of a known size.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist wheels *.egg-info
