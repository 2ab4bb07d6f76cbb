# Each target prepares .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench zoo selftrain selftrain-full clean

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

SELFTRAIN := runs/selftrain
BACKBONE := $(SELFTRAIN)/swav/backbone.safetensors
PRETRAIN = method=swav data=scenes encoder=resnet10_half image_size=64 views.full.size=48 local_size=24 \
	method.queue_size=0 method.prototypes=128 data.batch_size=128 trainer.max_epochs=100 monitor.doctor=false
FRACTION = task=selftrain grid=fraction init=$(BACKBONE)
QUICK = $(FRACTION) fractions=[0.1,1.0] steps=1800
FULL = $(FRACTION) fractions=[0.1,0.2,0.5,1.0] cells=$(SELFTRAIN)/cells
AUGMENT = task=selftrain grid=augment init=$(BACKBONE) cells=$(SELFTRAIN)/cells
# $(call run,NAME,WORDS): a run, or the rest of one that was stopped
run = $(BIN)/python -m sslzoo $(if $(wildcard $(SELFTRAIN)/$1/config.yaml),resume=$(SELFTRAIN)/$1,$2 run_dir=$(SELFTRAIN)/$1)

selftrain: $(BACKBONE)  ## pre-train or self-train? two label counts, controls, one seed: under an hour on two cores
	$(call run,quick,$(QUICK))

selftrain-full: $(BACKBONE)  ## the same at four label counts, and with S1 to S4: hours, goes on where it was stopped
	$(call run,fraction,$(FULL))
	$(call run,augment,$(AUGMENT))

$(BACKBONE): | $(VENV)/installed
	$(call run,swav,$(PRETRAIN))

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
