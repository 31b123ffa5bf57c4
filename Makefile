# make setup   make .venv with all that the trainer and the tests need (once)
# make demo    train on the embedded toy city, print a table, write pictures
# make test    check the style, run the tests
# make lint    check the style alone
# make clean   remove what builds and tests leave; .venv, data/ and runs/ stay

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: setup demo test lint clean
setup: $(READY)

demo: $(READY)
	$(VENV)/bin/python bench/demo.py

# A process a core, each with one thread.
test: lint
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(READY)
	$(VENV)/bin/ruff check .

# What builds the extension comes first, since an install without build isolation builds with what
# is in .venv.
$(READY): setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/* csrc/cuda/sm90/*) | $(VENV)/bin/pip
	@echo "Installing into $(VENV); the first time this takes some minutes."
	$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt setuptools wheel ninja torch numpy
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	@# Its place is taken by Pillow where it has no wheel: it is never built.
	-$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt --only-binary imagecodecs imagecodecs
	@# Headers for a test, without the many packages that their tools need.
	-$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt --no-deps nvidia-cutlass
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed: make PYTHON=/path/to/python3.12 setup")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
