# Each target makes the virtual environment when it is missing, and needs nothing else but Python 3.11+ and a package index.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready

.PHONY: demo test slow bench lint clean

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV): torch and what it brings are some two gigabytes, which takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,viz]'
	touch $(READY)

demo: $(READY)  ## train a small model on built-in text and watch it write (about two minutes)
	$(VENV)/bin/textdiffusion demo

test: $(READY)  ## lint, types, tests and their coverage
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest --cov

slow: $(READY)  ## the tests that take minutes each, and those of lm-evaluation-harness, which brings sixty packages
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[eval]'
	$(VENV)/bin/python -m pytest -m slow

bench: $(READY)  ## time training and sampling against plain re-statements of public repositories, and write docs/speed.md (a quarter of an hour)
	$(VENV)/bin/python benchmarks/bench.py

lint: $(READY)  ## format and check
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage*
