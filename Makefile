# layercard: set-up and checks. `make demo` shows the whole path; `make test` proves it.
VENV  := .venv
OLDEST := .venv-oldest
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
# The first of these that runs and is recent enough for constraints.txt.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
DEMO  := demo
SECONDS := 600
SAMPLE := benchmarks/results/placements

.PHONY: help setup demo test test-slow mutants fuzz bench bench-tables report-sample lint docs cli-docs clean

help:
	@echo "make setup      virtual environment in $(VENV) with everything for development"
	@echo "make demo       layercard run on the embedded model, beside the usual training; results in $(DEMO)/"
	@echo "make test       all quick tests"
	@echo "make test-oldest  the quick tests with the lowest versions promised, in a virtual environment of 6 GB"
	@echo "make test-slow  the tests that take minutes or need the 135M model"
	@echo "make mutants    small mutations of the mathematics, each of which a test must notice"
	@echo "make fuzz       broken files for every reader, SECONDS=600 each"
	@echo "make bench      every benchmark, results in benchmarks/results/, then the tables in README.md and docs/"
	@echo "make report-sample  the report of the committed benchmark files, in build/"
	@echo "make lint       ruff, mypy, generated tables and command line page"
	@echo "make docs       the documentation site in site/"
	@echo "make cli-docs   write docs/cli.md and docs/api.md from the source, and the roadmap of docs/index.md"
	@echo "make clean      remove what the targets above made, but neither $(VENV) nor results"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later found; name one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[app,dev,docs,ray]"
	@touch $@

demo: setup
	$(BIN)/layercard demo --output $(DEMO)

test: setup
	$(BIN)/python -m pytest -m "not slow" -n 2

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -m "not slow"

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later found; name one with PYTHON=..." >&2; exit 1; }
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[app,dev,ray]"
	@touch $@

test-slow: setup
	$(BIN)/python -m pytest -m slow

mutants: setup
	$(BIN)/python tests/mutants.py

fuzz: setup
	cd tests && ../$(BIN)/python -m fuzzing.run --seconds $(SECONDS)

bench: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	set -e; for script in benchmarks/*.py; do case $$script in */tables.py|*/common.py|*/single_layer.py) ;; \
		 *) $(BIN)/python $$script;; esac; done
	$(MAKE) bench-tables

report-sample: setup
	mkdir -p build
	$(BIN)/layercard select $(SAMPLE)/cards/e2e.json --strategy uniform --k 5 -o build/uniform.json --force >/dev/null
	$(BIN)/layercard select $(SAMPLE)/cards/e2e.json --stock -o build/balanced.json --force >/dev/null
	$(BIN)/layercard report $(SAMPLE)/cards/e2e.json build/balanced.json build/uniform.json $(SAMPLE)/cards/webnlg.json \
		$(SAMPLE)/cards/gsm8k.json $(SAMPLE)/runs $(SAMPLE)/times benchmarks/results/placements_table.json \
		benchmarks/results/trade_off_e2e.json -o build/report-sample.html --force

bench-tables: setup
	$(BIN)/python benchmarks/tables.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python docs/generate_roadmap.py --check
	$(BIN)/python docs/generate_api.py --check
	$(BIN)/python docs/generate_architectures.py --check

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

cli-docs: setup
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_roadmap.py
	$(BIN)/python docs/generate_api.py
	$(BIN)/python docs/generate_architectures.py

clean:
	rm -rf site dist build $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
