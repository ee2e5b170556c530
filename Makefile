# Developer's shortcuts. `make setup` once, then `make check test` before every commit.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help setup check format test test-all bench native ci clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## virtual environment with everything development needs
	./quickstart.sh --dev

check: ## linters, formatters, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.h

format: ## put the code into its one form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*/*.cpp csrc/*/*.h

test: ## the fast tests
	$(BIN)/pytest -q -m "not slow"

test-all: ## all tests
	$(BIN)/pytest -q

bench: ## cache bookkeeping; with MODEL=FOLDER also the engine against transformers
	$(BIN)/python benchmarks/kv_cache_micro.py
	$(if $(MODEL),$(BIN)/python benchmarks/engine_vs_transformers.py --model "$(MODEL)")

native: ## rebuild the native kernels in place
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .

ci: ## what a change must pass, from nothing
	bash .ci/run

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage htmlcov
