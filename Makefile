# Each target sets up what it needs: a virtual environment in .venv with this package and its extras.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

.PHONY: help demo demo-few-step models test lint docs bench gpu clean

help:
	@echo "make demo           fine-tune the embedded model on the embedded images; results in demo/"
	@echo "make demo-few-step  turn the demo's model, made first if needed, into a few-step one in demo-few-step/"
	@echo "make models         save the configs of the embedded models again with the current classes"
	@echo "make test           the whole test suite"
	@echo "make lint           ruff, the type checker and the import rules"
	@echo "make docs           the documentation as a site in site/"
	@echo "make bench          speed and memory, as ratios; minutes"
	@echo "make gpu            tests, benchmarks and short training runs on a GPU; 25 minutes, report in gpu-report/"
	@echo "make clean          remove the virtual environment, the site and the demos"

.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/ddgan # lets type checkers and editors find the package
	@touch $@

# the demos need less than the tests
.venv/trains: pyproject.toml | .venv/bin/python
	@test .venv/installed -nt pyproject.toml || $(BIN)/python -m pip install --disable-pip-version-check -e ".[train]"
	@touch $@

demo: .venv/trains
	$(BIN)/ddgan demo

demo-few-step: demo
	$(BIN)/ddgan few-step --config examples/recipes/few_step_demo.yaml --resume_from_checkpoint latest

models: .venv/installed
	$(BIN)/python examples/models/save_models.py

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/installed
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

# MNIST=path/to/MNIST FASHION_MNIST=path/to/FashionMNIST add the training runs. Without .venv, $(PYTHON) must have the extras.
gpu:
	$(if $(wildcard .venv/installed),$(BIN)/python,$(PYTHON)) benchmarks/report_gpu.py \
	  $(if $(MNIST),--mnist $(MNIST)) $(if $(FASHION_MNIST),--fashion_mnist $(FASHION_MNIST))

clean:
	rm -rf .venv site demo demo-few-step
