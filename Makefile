# Both targets are complete on a machine with Python >= 3.11, make and a C library: they make a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
EPOCHS ?= 10# of the demo
FPSIM = $(VENV)/bin/fpsim

.PHONY: demo test docs install bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

demo: install
	$(FPSIM) run quickstart name=quickstart-fp32 emulation=null training.epochs=$(EPOCHS)
	$(FPSIM) run quickstart training.epochs=$(EPOCHS)
	$(FPSIM) report runs/quickstart-fp32 runs/quickstart

test: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

docs: install
	$(VENV)/bin/python -m sphinx -q -W -n --keep-going docs docs/_build/html
	@echo docs/_build/html/index.html

bench: install
	$(FPSIM) bench --full

clean:
	rm -rf $(VENV) build *.egg-info docs/_build docs/_generated
