# make demo  the whole job on photographs that come with scikit-image, in minutes, without a GPU
# make test  the test suite      make lint  format and lint
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

# The environment is made once and again whenever the pinned list changes.
.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("CREPS needs Python 3.10 or newer; set PYTHON=/path/to/python3.10+" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf .venv out
