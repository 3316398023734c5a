# What the two commands do is `pip install -c constraints.txt -e .` and `dvc repro`; see the README for the plain lines.
#   make PYTHON=python3.12 repro            another Python, 3.11 or newer
#   make report BASE=HEAD~1                 what the last commit changed
# pip reads its own environment variables, for instance to install from a folder of wheels: see the README.
PYTHON ?= python3

# dvc.yaml's commands say `python`: the environment comes first on PATH. An active one that satisfies constraints.txt is used
# as it is, and then the project need not be installed in it: hence `python -m` throughout.
modern = import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")
in_environment = $(PYTHON) -c '$(modern)' && bin=$$($(PYTHON) tools/environment.py $(1)) && PATH="$$bin:$$PATH" && export PATH

.PHONY: help repro experiments test test-all report clean

help:  ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'PYTHON=python3.12    another Python, 3.11 or newer'

repro:  ## make .venv if it is needed, run the stages that are out of date, say where the pictures are
	@$(call in_environment) && python -m dit.cli check && python -m dvc repro && python -m dit.cli where

experiments:  ## what the experiments have reached, and in which settings they differ
	@$(call in_environment) && python tools/experiments.py

test:  ## lint, and run the tests of every day
	@$(call in_environment,--extra test) && python -m ruff check . && python -m pytest

test-all:  ## lint, and run all tests, the slow ones too
	@$(call in_environment,--extra test) && python -m ruff check . && python -m pytest -m ""

report:  ## what changed since BASE (a git revision), as report.md and dvc_plots/index.html
	@$(call in_environment) && bash tools/report.sh $(or $(BASE),origin/main)

clean:  ## remove .venv and the caches of the tools; data, models, samples and MLflow's runs stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './.dvc/*' -prune -exec rm -rf {} +
