# Each target prepares .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench zoo clean

demo: $(VENV)/installed  ## pretrain MoCo on the built-in photographs and show that it learned
	$(BIN)/python -m sslzoo method=moco

test: $(VENV)/installed  ## the whole suite, with coverage
	$(BIN)/python -m pytest --cov=sslzoo --cov-report=term:skip-covered --cov-fail-under=90

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed  ## every table in benchmarks/README.md
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/pretrain.py

zoo: $(VENV)/installed  ## every method at demo scale, three seeds: the README's table
	$(BIN)/python benchmarks/zoo.py

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
