# make demo    install into .venv, then run the main job on real text (examples/demo/run.sh)
# make test    the tests
# make test-cluster  those on pretend hosts and a real SLURM, as root (tests/cluster/needs.py)
# make test-faults  kill a running schedule thirty times, for a quarter of an hour
# make lint    ruff and mypy
# make docs    the documentation as a site, in site/
# make clean   remove what these made: .venv, runs/demo, site, caches

SHELL := /bin/bash
VENV := .venv
# An environment made by other means holds neither stamp; pip then finds everything installed.
INSTALLED := $(VENV)/.installed
DEVELOPMENT := $(VENV)/.installed-dev
PYTHON := python3
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo install install-dev test test-cluster test-faults lint docs clean

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHON=python examples/demo/run.sh

install: $(INSTALLED)

install-dev: $(DEVELOPMENT)

test: $(DEVELOPMENT)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" python -m pytest

test-cluster: $(DEVELOPMENT)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" python -m tests.cluster.needs
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" python -m pytest -n 0 -m cluster tests/cluster

test-faults: $(DEVELOPMENT)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" python -m pytest -n 0 -m faults tests/faults

lint: $(DEVELOPMENT)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(DEVELOPMENT)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) runs/demo site build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# DeepSpeed is built from its source, for which pip wants `wheel`.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) && $(PIP) wheel || { rm -rf $(VENV); exit 1; }

$(INSTALLED): requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV): torch, DeepSpeed and more, which takes minutes"
	$(PIP) -r requirements.txt
	$(PIP) -e . --no-deps
	touch $@

$(DEVELOPMENT): requirements-dev.txt $(INSTALLED)
	@echo "installing what tests and docs need into $(VENV)"
	$(PIP) -r requirements-dev.txt
	touch $@
