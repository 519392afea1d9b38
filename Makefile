# Each target makes what it needs in .venv, from a bare clone with Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo demo-flax demo-lora test faults benchmark lint sync clean

demo: $(VENV)/installed
	$(VENV)/bin/python tests/demo.py --output_dir demo-output

demo-flax: $(VENV)/installed $(VENV)/installed-flax
	$(VENV)/bin/python tests/demo.py --output_dir demo-output-flax --script train_text_to_image_flax.py

demo-lora: $(VENV)/installed
	$(VENV)/bin/python tests/demo.py --output_dir demo-output-lora --rank 16

test: $(VENV)/installed-tests
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests

faults: $(VENV)/installed-tests
	$(VENV)/bin/python tests/faults.py --kills 30

# Against what the mirrored script does, or by hand against its real file: see tests/benchmarks/README.md.
benchmark: $(VENV)/installed-tests
	$(VENV)/bin/python tests/benchmarks/benchmark.py --size small --use_ema \
		--levers plain workers cache memory-returned alone --versus tests/benchmarks/recipe.py

lint: $(VENV)/bin/ruff
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

sync:
	$(PYTHON) tests/sync.py

clean:
	rm -rf $(VENV) demo-output demo-output-flax demo-output-lora

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/bin/ruff: tests/requirements.txt | $(VENV)/bin/pip
	$(INSTALL) $$(grep '^ruff==' $<)
	touch $@

$(VENV)/installed: requirements.txt | $(VENV)/bin/pip
	@echo "installing the requirements into $(VENV), which takes some minutes the first time"
	$(INSTALL) -r $<
	touch $@

$(VENV)/installed-flax: requirements_flax.txt | $(VENV)/bin/pip
	$(INSTALL) -r $<
	touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed $(VENV)/installed-flax
	$(INSTALL) -r $<
	touch $@
