# The two commands a newcomer types, and what they need. Everything is installed into .venv, nothing elsewhere.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow lint wheel clean

# Teacher, cache, recalibration, 4-bit student, report: the whole method on a generated task, on a CPU.
demo: $(INSTALLED)
	$(BIN)/first-trl demo

# The default test suite: no network, no data but its own.
test: $(INSTALLED)
	$(BIN)/python -m pytest

# Minutes of work each: many kills of a caching run, a browser, and the like.
slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

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
	rm -rf $(VENV) build dist *.egg-info
