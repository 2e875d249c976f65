# `make demo` and `make test` are the two commands; every target sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/.train
	$(BIN)/gem-kernels demo --output_dir runs/demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and alone: its wheel decides between the CPU and the CUDA build, and everything else follows it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.%: $(VENV)/.torch setup.py
	$(INSTALL) --editable ".[$*]"
	touch $@
