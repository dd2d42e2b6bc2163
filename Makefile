# One-word commands; each first makes .venv and installs into it.
#   make quickstart   train three tasks on drawn rooms, evaluate, draw: runs/quickstart/report.html
#   make test         the test suite; TESTS=slow: what takes minutes
#   make chaos        kill, damage, fill, fuzz and soak, about an hour: tests/chaos
#   make lint         ruff, mypy, and the layers of imports
#   make docs         the documentation as a site: docs/_build/html/index.html
#   make clean        remove .venv and everything built; runs/ stays
# PYTHON=python3.12 make test takes another Python; changing it makes .venv anew.
PYTHON ?= python3
WORKERS ?= auto
TESTS ?= not slow and not chaos

SHELL := /bin/bash
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv/made-with-python$(VERSION)
# uv installs the 5 GB of torch in seconds where pip takes minutes
INSTALL := .venv/bin/python -m uv pip install --quiet --python .venv/bin/python

.PHONY: quickstart test chaos lint docs clean

quickstart: .venv/installed
	@# an earlier run is kept under another name, never overwritten
	@if [ -e runs/quickstart ]; then mv -v runs/quickstart "runs/quickstart-until-$$(date +%Y%m%d-%H%M%S)"; fi
	.venv/bin/python tools/train.py configs/quickstart.yaml --output runs/quickstart
	.venv/bin/python tools/eval.py runs/quickstart/checkpoints/best.pt --report runs/quickstart/report.html \
		--expect "segmentation/miou>=0.70" --expect "detection/ap50>=0.50" --expect "depth/delta1>=0.90"
	@echo "the pictures and figures are in runs/quickstart/report.html"

test: .venv/installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "$(TESTS)" --durations 30

chaos: .venv/installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m chaos tests/chaos

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

docs: .venv/installed-docs
	.venv/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean:
	rm -rf .venv docs/_build docs/configuration.md build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV):
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

.venv/installed: setup.py pyproject.toml $(VENV)
	@echo "installing torch and the other packages, about 5 GB: seconds to minutes"
	$(INSTALL) --editable .
	touch $@

.venv/installed-dev: setup.py pyproject.toml $(VENV)
	@echo "installing torch, the other packages and the development tools, about 5 GB: seconds to minutes"
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/installed

.venv/installed-docs: setup.py pyproject.toml $(VENV)
	$(INSTALL) --editable '.[docs]'
	touch $@ .venv/installed
