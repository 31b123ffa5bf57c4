# make setup   make .venv with all that the trainer and the tests need (once)
# make demo    train on the embedded toy city, print a table, write pictures
# make test    check the style, run the tests
# make lint    check the style alone
# make clean   remove what builds and tests leave; .venv, .venv-oldest, data/ and runs/ stay
# make test-faults   kill trainings and fill their disk at random moments (FAULTS=50 of them)
# make test-oldest   run the tests of loss, kernels and build with the oldest PyTorch, in .venv-oldest

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

OLDEST := .venv-oldest
# The first that runs: a python3.12 on the PATH may be a version manager's stub.
OLDEST_PYTHON ?= $(firstword $(foreach python,python3.12 python3.11 $(PYTHON),\
	$(shell $(python) -c 'import ensurepip' 2>/dev/null && echo $(python))))
OLDEST_TESTED := bank choice cpp cuda derivatives eager extension gluon gpu_loss loss ops overlap \
	proven settled tiles triton upsampled verification

.PHONY: setup demo test test-faults test-oldest lint clean
setup: $(READY)

demo: $(READY)
	$(VENV)/bin/python bench/accuracy/demo.py

# A process a core, each with one thread.
test: lint
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-faults: $(READY)
	$(VENV)/bin/python -m pytest -q -s tests/fault_round.py

# Installed, not editable: an extension built in place would take that of $(VENV) away, or be loaded
# there. Run in tests, since in this folder Python would import the cac_fast that lies here.
test-oldest: | $(OLDEST)/bin/pip
	@echo "Installing into $(OLDEST); the first time this takes some minutes."
	$(OLDEST)/bin/python -m pip install --quiet --no-compile -c constraints-oldest.txt setuptools wheel ninja torch numpy
	rm -rf build/lib*
	PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" $(OLDEST)/bin/python -m pip install --quiet --no-compile -c constraints-oldest.txt --no-build-isolation '.[dev]'
	@touch $(OLDEST)/.ready
	cd tests && ../$(OLDEST)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(notdir $(sort $(wildcard $(OLDEST_TESTED:%=tests/test_%*.py))))

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# What builds the extension comes first, since an install without build isolation builds with what
# is in .venv.
$(READY): setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*.py csrc/cuda/* csrc/cuda/sm90/*) | $(VENV)/bin/pip
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

$(OLDEST)/bin/pip:
	@test -n "$(OLDEST_PYTHON)" || { echo "Python 3.12 or 3.11 is needed: make OLDEST_PYTHON=/path/to/python3.12 test-oldest"; exit 1; }
	$(OLDEST_PYTHON) -m venv $(OLDEST)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./$(OLDEST) \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
