# `make demo` shows the system, `make check` is for every edit, `make test` for every change. All set up .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A local directory of wheels (pip's own setting) serves torch's CPU build; otherwise uv's CPU backend does.
ifneq ($(strip $(PIP_FIND_LINKS)),)
TORCH := --find-links $(PIP_FIND_LINKS)
else
TORCH := --torch-backend=cpu
endif

.PHONY: demo check test test-slow test-cluster lint format clean

demo: $(STAMP)
	$(BIN)/r2m-ray prepare experiment=demo
	$(BIN)/r2m-ray train experiment=demo run.name=demo-$$(date +%Y%m%d-%H%M%S)

# Lint, types and every test that starts no engine. Such tests share nothing, so that two processes run them.
# The models are tiny: a second thread costs more than it does.
check test test-slow: export OMP_NUM_THREADS = 1

check: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not engine and not slow"

test: check
	$(BIN)/python -m pytest -q -m "engine and not slow and not gpu and not cluster"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow and not gpu and not cluster"

test-cluster: $(STAMP)
	$(BIN)/python -m pytest -q -s -m cluster tests/cluster

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode $(TORCH) --constraint constraints.txt --editable '.[cpu,sweep,dev]'
	touch $@
