# Two commands do everything on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo bench results test test-all test-oldest lint docs clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml $(PIP_CONSTRAINT)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxfa needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup
	$(RUN) -m experiments run compare

# On cores that nothing else uses. What is measured stays: delete runs/NAME-cpu to measure it again.
bench: setup
	for name in steps starts growth memory pipeline; do $(RUN) -m experiments run $$name || exit 1; done

results: setup
	$(RUN) -m experiments results

test: setup
	$(RUN) -m pytest -n 2 --dist worksteal -m "not long"

test-all: setup
	$(RUN) -m pytest -n 2 --dist worksteal

test-oldest:
	PIP_CONSTRAINT=.ci/oldest.txt $(MAKE) test VENV=$(VENV)-oldest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

docs: $(VENV)/docs
	$(RUN) -m sphinx -q -W --keep-going docs build/docs
	@echo "Documentation: $(CURDIR)/build/docs/index.html"

$(VENV)/docs: $(VENV)/ready
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest .pytest_cache build dist *.egg-info
