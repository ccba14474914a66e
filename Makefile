# make demo: install and run the demo. make test: install with dev tools and run every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A run that is in the way is never overwritten, so each demo gets a folder of its own.
DEMO_OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-slow interop lint install install-dev bench clean

demo: install
	$(BIN)/lora-ft train --preset demo --out $(DEMO_OUT)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 12

test-slow: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target build/torchao --upgrade torchao
	PYTHONPATH=build/torchao OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow or not slow" -k torchao \
	  tests/integration/test_torchao.py tests/contract/test_registries.py

# llama.cpp itself reads what is exported for it; its Python package is built from source, about 6 minutes on 2 cores.
interop: install-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	$(BIN)/python -m pytest -q -m interop tests/interop

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install-dev
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/train_step.py

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || (echo "python3 -m venv failed; on Debian: apt-get install python3-venv" && false)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
