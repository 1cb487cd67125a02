# `make train` and `make test` are all that a fresh clone needs; both install into .venv first.

PYTHON ?= python3
ARGS ?=
WHEELS ?= dist

BIN := .venv/bin
INSTALLED := .venv/installed-by-make

.PHONY: install train test check wheel

install: $(INSTALLED)

train: install  ## digits on 4 local ranks; ARGS="--samples 20000" and the like are passed on
	@$(BIN)/lasgd train --data digits --ranks 4 $(ARGS)

# Two runs, each with a summary of its own: tests that start processes measure seconds, so nothing runs beside them.
test: install
	@status=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not processes" || status=1; \
	$(BIN)/python -m pytest -m processes || status=1; \
	exit $$status

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

wheel: install
	@rm -rf build
	@$(BIN)/python -m build --wheel --no-isolation --outdir "$(WHEELS)"
	@rm -rf build

# Made anew only when what is to be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "lasgd needs Python 3.11 or newer, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1)." \
	"Name another one: make PYTHON=python3.12 install" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into .venv; PyTorch is large, so the first time takes minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
