# Everything from a fresh checkout: each target makes the virtual environment first if it is missing or out of date.
# Another interpreter or place: make test PYTHON=python3.12 VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests, each with one thread.
JOBS ?= 2

RUN := $(VENV)/bin/python
# Written last, so that an interrupted installation is taken up again instead of being taken for a whole one.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint docs clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 14

venv: $(STAMP) ## install everything into .venv, unless that is done already

demo: $(STAMP) ## pre-train five systems and MAE, judge their features, report in output/demo
	$(RUN) scripts/experiments/demo.py

test: $(STAMP) ## run all tests, the slow ones too
	$(RUN) -m pytest -n $(JOBS) --dist loadfile

lint: $(STAMP) ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

docs: $(STAMP) ## build a site of docs/ in output/site
	$(RUN) -m mkdocs build --strict --config-file scripts/tools/mkdocs.yml

clean: ## remove caches and the demo's output; training runs and the virtual environment stay
	rm -rf output/demo .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

CHECK_311 := import sys; sys.exit(sys.version_info < (3, 11))

$(STAMP): requirements.txt requirements-downstream.txt requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c '$(CHECK_311)' || { echo "$$($(PYTHON) -V) is too old, 3.11 is needed: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "$(PYTHON) has no ensurepip: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(RUN) -c '$(CHECK_311)' || { echo "$(VENV) holds $$($(RUN) -V), 3.11 is needed: remove that folder"; exit 1; }
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install -r requirements-dev.txt
	# mmcv brings opencv-python, which needs a desktop's libraries; the headless files replace its own
	$(RUN) -m pip install --quiet --force-reinstall --no-deps "$$(grep ^opencv requirements.txt)"
	@touch $@
