# Each target makes what it needs in .venv, from a bare clone with Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/python tests/demo.py --output_dir demo-output

test: $(VENV)/installed-tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile tests

lint: $(VENV)/bin/ruff
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) demo-output

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/bin/ruff: tests/requirements.txt | $(VENV)/bin/pip
	$(INSTALL) $$(grep '^ruff==' $<)
	touch $@

$(VENV)/installed: requirements.txt | $(VENV)/bin/pip
	@echo "installing requirements.txt into $(VENV), which takes some minutes the first time"
	$(INSTALL) -r $<
	touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	$(INSTALL) -r $<
	touch $@
