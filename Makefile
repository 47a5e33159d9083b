# Two commands for a fresh machine:  make quickstart   make test
# A decoder that learns to read:      make reader   (hours; interrupted, the same again goes on)
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Bits learned by dense models, experts and memory layers: make capacity   (hours; the same goes on)
CAPACITY_DIR ?= runs/capacity

# For the reader: a folder of EntityQuestions' files and articles make more data than the extract
# in strata; READER_TRAIN are further options and overrides, as common.run.precision=bf16.
READER_QUESTIONS ?=
READER_PROSE     ?=
READER_DIR       ?= runs/reader
READER_TRAIN     ?=

# Each computes with the threads that torch finds: more of them only where there are more cores.
TEST_PROCESSES ?= 2

.PHONY: install quickstart reader capacity test test-ray test-slurm lint clean
.DELETE_ON_ERROR:

install: $(VENV)/.core

quickstart: $(VENV)/.core
	$(BIN)/strata quickstart

reader: $(VENV)/.core
	$(BIN)/strata reader data --out $(READER_DIR)/data $(if $(READER_QUESTIONS),--questions $(READER_QUESTIONS)) $(addprefix --prose ,$(READER_PROSE))
	$(BIN)/strata reader train --data $(READER_DIR)/data --out $(READER_DIR)/run $(READER_TRAIN)
	$(BIN)/strata reader eval --data $(READER_DIR)/data --run $(READER_DIR)/run
	$(BIN)/strata reader pack --data $(READER_DIR)/data --run $(READER_DIR)/run --out $(READER_DIR)/packed

capacity: $(VENV)/.dev
	$(BIN)/python benchmarks/capacity_study.py --out $(CAPACITY_DIR)

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

# Ray, on this machine; some two minutes.
test-ray: $(VENV)/.dev
	$(PIP) install --quiet -c constraints.txt -e ".[dev,ray]"
	$(BIN)/python -m pytest -m ray tests/ray_engine

# A real Slurm of three nodes on this machine; needs root, and apt-get where Slurm is not installed.
test-slurm: $(VENV)/.dev
	@tests/slurm/install.sh
	$(BIN)/python -m pytest -m slurm tests/slurm

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# The stamps make both commands work offline once they have run. torch goes in first and by an
# exact pin: a looser request may bring gigabytes of CUDA packages to a machine without a GPU.
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "strata needs Python 3.10 or newer, found " + sys.version.split()[0] + ": name another with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt "$(TORCH)"
	$(PIP) install --quiet -c constraints.txt -e ".[bank]"
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@
