# `make demo` and `make test` are the two commands; every target sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench aot clean

demo: $(VENV)/.train
	$(BIN)/gem-kernels demo --output_dir runs/demo

# Once as on any CPU (the kernels are compiled for every architecture), once with the Triton kernels interpreted.
test: $(VENV)/.test
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(KERNEL_TESTS)

KERNEL_TESTS := $(addprefix tests/test_, $(addsuffix .py, \
	kernels compile linear_logprob logprob group_loss scoring layouts))

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks

# Every kernel compiled for every architecture, without a GPU: registers, spills, shared memory.
aot: $(VENV)/.test
	$(BIN)/python -m gem_kernels.aot --markdown docs/aot.md

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
