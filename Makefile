# Everything runs in .venv, made with the newest Python from 3.11 to 3.13 that works. `make PYTHON=... demo` overrides.
PYTHON ?= $(shell for v in 3.13 3.12 3.11; do \
	for p in python$$v $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v*/bin/python$$v 2>/dev/null) python3; do \
		"$$p" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$$v')" >/dev/null 2>&1 \
			&& { echo "$$p"; exit; }; \
	done; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow bench bench-quick lint clean

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv was found; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/iontwin fit experiments/configs/demo.toml --out runs/demo --replace
	$(BIN)/iontwin optimize experiments/configs/demo.toml --from runs/demo --out runs/demo-pulses --replace

# Most of the time of a test is the compiler's: the first level of its optimization is enough to test with. The slow tests
# run what users run.
test: $(READY)
	XLA_FLAGS="--xla_backend_optimization_level=1 $(XLA_FLAGS)" $(BIN)/python -m pytest -n auto --dist loadfile --durations=10

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow --durations=20 -rP

# The peers live in an environment of their own: what they need must not decide what the twin runs with.
BENCH := .venv-bench
$(BENCH)/.ready: pyproject.toml
	"$(PYTHON)" -m venv --clear $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

# QuTiP-QOC needs a NumPy older than the package's: a process of B8 runs there.
QOC := .venv-qoc
$(QOC)/.ready: Makefile
	"$(PYTHON)" -m venv --clear $(QOC)
	$(QOC)/bin/python -m pip install --quiet --disable-pip-version-check 'qutip-qoc==0.2.0' 'qutip-jax==0.1.1' 'qutip>=5.1,<6' 'numpy>=1.26,<2' 'jax>=0.5,<0.6'
	@touch $@

# MerLin brings torch, several GB where it brings CUDA along: a process of B10 runs there.
MERLIN := .venv-merlin
$(MERLIN)/.ready: Makefile
	"$(PYTHON)" -m venv --clear $(MERLIN)
	$(MERLIN)/bin/python -m pip install --quiet --disable-pip-version-check 'merlinquantum>=0.4,<0.5'
	@touch $@

bench: $(BENCH)/.ready $(QOC)/.ready $(MERLIN)/.ready
	$(BENCH)/bin/python -m experiments.benchmarks

bench-quick: $(BENCH)/.ready
	$(BENCH)/bin/python -m experiments.benchmarks --quick

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

clean:
	rm -rf $(VENV) $(BENCH) $(QOC) $(MERLIN) runs .pytest_cache .ruff_cache
