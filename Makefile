PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= $(shell nproc 2>/dev/null || echo logical)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-dist test-gpu lint format digits pocket study front ablations bench bench-gpu equivalence stages memory scale compiled calibration budget dialogue mixture llava-hr install-record clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the tested versions; does nothing when they are in place

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing the tested versions into $(VENV); the first time takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt lmms-eval
	@touch $@

quickstart: setup ## route the pocket model and draw its report
	$(BIN)/roe quickstart

test: lint ## lint, then the tests that take seconds
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile -m "not slow and not distributed and not gpu and not vllm"

test-slow: setup ## the tests that train for minutes
	$(BIN)/python -m pytest -m "slow and not distributed and not gpu and not vllm"

test-dist: setup ## several processes: one run under every engine, launchers, kills; half an hour on two cores
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[deepspeed]"
	$(BIN)/python benchmarks/equivalence.py --json runs/bench/equivalence.json
	$(BIN)/python -m pytest -m distributed

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: setup ## check style, layout and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup ## lay out the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

digits: setup ## train routing on the digits task, then evaluate it
	$(BIN)/roe train digits
	$(BIN)/roe evaluate runs/digits

pocket: setup ## train the pocket model's weights anew, into runs/pocket and runs/pocket_hard
	$(BIN)/roe train pocket
	$(BIN)/roe train pocket_hard

study: setup ## train routing and its rivals on the digits, three seeds; hours, in shards of 50 minutes
	$(BIN)/roe study digits --minutes 50

front: setup ## train routing and every other way to save at 10 to 40 %, three seeds, recorded; a day, in shards of 50 minutes
	$(BIN)/roe study front --minutes 50 --json benchmarks/results/front.json

ablations: setup ## train the method without each of its parts, three seeds, recorded; hours, in shards of 50 minutes
	$(BIN)/roe study ablations --minutes 50 --json benchmarks/results/ablations.json

bench: setup ## time dense, routed and static twin on random weights; 20 minutes on two CPU cores
	$(BIN)/roe bench --preset cpu-100m --device cpu --json benchmarks/results/cpu-100m.json

bench-gpu: setup ## the same with LLaVA-1.5-7B's shapes on a CUDA device
	$(BIN)/roe bench --preset llava-1.5-7b --device cuda --json benchmarks/results/llava-1.5-7b.json

equivalence: setup ## record one run under every engine; ten minutes on two CPU cores
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[deepspeed]"
	$(BIN)/python benchmarks/equivalence.py

stages: setup ## time a training step of each stage beside dense fine-tuning
	$(BIN)/python benchmarks/stages.py

memory: setup ## measure what training steps take of memory beside what is counted; a quarter of an hour
	$(BIN)/python benchmarks/memory.py

scale: setup ## train LoRA and distillation on the digits beside full tuning, three seeds; hours, in shards of 50 minutes
	$(BIN)/roe study scale --minutes 50 --json benchmarks/results/scale.json

compiled: setup ## time a decoding step with and without compiled layers on a CPU
	$(BIN)/python benchmarks/compiled.py

calibration: setup ## calibrate the study's routed models to 10 to 40 %, and check on held-out questions
	$(BIN)/python benchmarks/calibration.py runs/digits/routed-33.33/seed-*

budget: setup ## trace the budgets of the study's routed models, and ask held-out questions at every skip ratio
	$(BIN)/python benchmarks/budget.py runs/digits/routed-33.33/seed-*

dialogue: setup ## measure chats of four turns with the study's routed models, under both policies
	$(BIN)/python benchmarks/dialogue.py runs/digits/routed-25/seed-*

mixture: setup ## check and halve 665,000 records beside json.load, and time loading; ten minutes and 2 GB on two CPU cores
	$(BIN)/python benchmarks/mixture.py

llava-hr: setup ## a small LLaVA-HR learns to read small digits, then to skip, beside controls, recorded; two hours on two CPU cores
	$(BIN)/python benchmarks/llava_hr.py

install-record: setup ## time a stranger's install: the wheel, an empty environment, the quickstart
	$(BIN)/python benchmarks/install.py

clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
