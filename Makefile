# make sweep   set up, run the smoke tier over every in-tree kernel, print the summary
# make test    set up, run the whole test suite
# make lint    ruff and the type checker
# PYTHON=... uses an interpreter that already has torch (CUDA or ROCm), triton, pytest, pytest-xdist, pyyaml and rich, for
# `test` hypothesis and jsonschema too; nothing is installed then. WORKERS=n sets the number of worker processes.

VENV := .venv
WORKERS := auto

ifdef PYTHON
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: sweep test lint clean

sweep: $(READY)
	$(RUN) -m pytest cases --tier smoke -n $(WORKERS)

test: $(READY)
	$(RUN) -m pytest tests -n $(WORKERS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/ready: pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "attnreg needs Python 3.11 or newer as python3"; exit 2; }
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
