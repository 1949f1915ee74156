# `make run` and `make test` each do everything on a fresh clone.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
LLAMA = .cache/llama_cpp_python-$(shell sed -n 's/^llama.cpp.python==//p' constraints.txt).tar.gz

# Nothing that we start reports to anyone.
export PYTHON
export DO_NOT_TRACK = true
export DVC_NO_ANALYTICS = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export MLFLOW_DISABLE_TELEMETRY = true
export OLIVE_DISABLE_TELEMETRY = 1
export ORT_TELEMETRY_DISABLED = 1
export PREFECT_SERVER_ANALYTICS_ENABLED = false

.PHONY: quick run up setup test test-all lint format docs constraints clean

quick: setup  ## a first result: the whole pipeline with little of everything, in a worktree (params.yaml stays as it is)
	$(BIN)/slmops run --worktree --set @recipes/quick.yaml

run: setup  ## the whole pipeline with params.yaml
	$(BIN)/slmops run

up: setup  ## Prefect's server, MLflow's and a worker, until Ctrl-C
	$(BIN)/slmops up

setup: .venv/.ready  ## the environment, once; about 10 minutes on 2 cores. Again where it was moved to another processor
	@$(BIN)/python infra/build_llama.py --check $(LLAMA) >/dev/null || infra/setup.sh

.venv/.ready: constraints.txt pyproject.toml infra/setup.sh infra/build_llama.py
	infra/setup.sh

test: setup lint  ## the style, the types and all but the slow tests; a file at a time in each of up to four processes
	$(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-all: setup lint  ## the slow tests too: the real model, minutes
	$(BIN)/python -m pytest -m ""

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup  ## the pages that are made from the code: parameters, their schemas, the command line
	$(BIN)/python -m docs.reference

constraints: setup  ## pin what is installed now
	infra/constraints.sh

clean:  ## the environment and all outputs; data, registry and the DVC cache stay
	rm -rf .venv build report.html .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.runs/*' -exec rm -rf {} +
