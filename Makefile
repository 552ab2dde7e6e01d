# Two commands do everything on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Numbers, theory and experiments do not depend on the versions as the interfaces do.
BEYOND_OLDEST := $(wildcard tests/test_experiments*.py tests/test_*theory.py tests/test_ldfa*.py tests/test_grape*.py tests/test_conservation.py tests/test_ssa.py tests/test_nn_ssa.py tests/test_real_data.py tests/test_rules.py tests/test_contract.py)

.PHONY: setup demo test test-all test-oldest lint clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxfa needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup
	$(RUN) -m experiments run compare

test: setup
	$(RUN) -m pytest -n 2 --dist worksteal -m "not long"

test-all: setup
	$(RUN) -m pytest -n 2 --dist worksteal

test-oldest: $(VENV)-oldest/ready
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal $(filter-out $(BEYOND_OLDEST),$(wildcard tests/test_*.py))

$(VENV)-oldest/ready: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check --constraint .ci/oldest.txt --editable '.[dev]'
	touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info
