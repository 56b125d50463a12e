# Two commands do everything on a fresh clone: `make demo` (the main job) and `make test`.
VENV ?= .venv
PYTHON ?= python3
OUT ?= pyrovae-report
BIN := $(VENV)/bin

.PHONY: demo test lint reproduce install help

help:
	@echo "make demo   create $(VENV), install pyrovae and run 'pyrovae compare' (report in $(OUT)/)"
	@echo "make test   create $(VENV), install pyrovae with its test tools; lint, types, tests"
	@echo "make reproduce   published figures and ours (hours; needs MNIST in PYROVAE_DATA; outside the tests)"
	@echo "VENV=path puts the environment elsewhere, PYTHON=python3.12 chooses the interpreter"

demo: $(VENV)/.installed
	@echo "== the main job: one belief net, every kind of inference (about two minutes; report in $(OUT)/)"
	$(BIN)/pyrovae compare --output $(OUT)

test: $(VENV)/.installed-test lint
	@echo "== tests"
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-test
	@echo "== lint"
	$(BIN)/ruff check pyrovae tests examples benchmarks
	$(BIN)/ruff format --check pyrovae tests examples benchmarks
	@echo "== types"
	$(BIN)/mypy

reproduce: $(VENV)/.installed
	$(BIN)/python benchmarks/step.py > benchmarks/results/step.txt
	$(BIN)/python benchmarks/speed.py > benchmarks/results/speed.txt
	$(BIN)/python benchmarks/reproduce.py all
	$(BIN)/python benchmarks/reproduce.py tutorial --epochs 30
	$(BIN)/python benchmarks/draw.py --bfloat16 --minutes 45 --wall 61 --batch 200 --lr 0.002

install: $(VENV)/.installed

$(BIN)/python:
	@echo "== creating the environment $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "== installing pyrovae (torch is large: about two minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "== installing pyrovae with its test tools (torch is large: about two minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.installed
