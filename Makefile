# Every target does its own set-up: Python 3.11, pip and make are enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PROMPT := 'prompt=    def __init__(self' max_tokens=48 temperature=0.5 seed=1

.PHONY: help venv demo test parity faults launchers lint check format clean exactness
help: ## this text
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

venv: $(READY) ## a virtual environment in .venv with everything: the distributed extras and an mpirun too

# Debian's python3 may come without ensurepip: then the system's pip fills the environment.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@echo "installing into .venv (about 3 GB with torch and Triton)"
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(READY) ## six domains of real text, trained for minutes; one domain's model cut out, compared, opened in transformers
	$(BIN)/sigmoe data data=six out=data/six
	$(BIN)/sigmoe train experiment=quickstart dataset=data/six out=runs/quickstart
	$(BIN)/sigmoe verify checkpoint=runs/quickstart
	$(BIN)/sigmoe extract checkpoint=runs/quickstart domain=python out=runs/quickstart-python transformers=true
	$(BIN)/sigmoe generate checkpoint=runs/quickstart domain=python $(PROMPT)
	$(BIN)/sigmoe generate checkpoint=runs/quickstart-python $(PROMPT)

exactness: $(READY) ## every domain cut out of six models, compared on 100,000 held-out tokens each: minutes
	$(BIN)/sigmoe data data=six out=data/six
	$(BIN)/sigmoe bench suite=exactness exactness.dataset=data/six out=benchmarks/results/exactness

test: $(READY) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

parity: $(READY) ## every layout of tensor, expert and data parallelism against one process; minutes
	OMP_NUM_THREADS=1 SIGMOE_PARITY=all $(BIN)/python -m pytest tests/distributed

faults: $(READY) ## every fault that the quick tests sample from, and every launcher's script; minutes
	OMP_NUM_THREADS=1 SIGMOE_FAULTS=all $(BIN)/python -m pytest --timeout=1800 tests/faults tests/distributed/test_launchers.py

launchers: $(READY) ## the quickstart, shortened, under every launcher on two ranks, and over two nodes; minutes
	$(BIN)/sigmoe data data=six out=data/six
	OMP_NUM_THREADS=1 SIGMOE_LAUNCHERS=all $(BIN)/python -m pytest --timeout=1800 tests/distributed/test_quickstart.py

lint: $(READY) ## static checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy -p sigmoe
	$(BIN)/lint-imports

check: lint test ## static checks, then all tests

format: $(READY) ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and what the demo made
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache sigmoe.egg-info data/six runs/quickstart \
	  runs/quickstart-python
