# Everything runs in an environment of its own, .venv, with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint package docs lab clean

demo: $(STAMP)
	$(BIN)/errata demo examples/facts.jsonl

# two processes of one thread each, a file to a process, so that what its tests share is made once; a run does not depend
# on how many there are. Files are in order, as the long ones come first. Bytecode is kept, since many tests start the
# program in a process of its own
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# the wheel, installed into an empty environment outside the repository, and used there
package: $(STAMP)
	$(BIN)/python -m pytest -m package tests/package

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lab: $(STAMP)
	$(BIN)/errata lab train out/lab

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist out errata-demo.safetensors
