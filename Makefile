# What the two commands do is `pip install -c constraints.txt -e .` and `dvc repro`; docs/install.md has the plain lines.
#   make PYTHON=python3.12 repro            another Python, 3.11 or newer
#   make report BASE=HEAD~1                 what the last commit changed
# pip reads its own environment variables, for instance to install from a folder of wheels.
PYTHON ?= python3
venv_bin := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

# Use the environment of PYTHON if it satisfies the pins (with the extras in EXTRAS), else .venv, which is made or brought up to
# date. dvc.yaml's commands say `python`, so the environment comes first on PATH. The project need not be installed in an active
# environment: hence `python -m` throughout. The stamp .venv/.satisfies-EXTRAS is newer than the two files that say what to install.
scripts = $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'
activate = if $(PYTHON) tools/satisfies_pins.py $(1) 2> /dev/null; then bin=$$($(scripts)); \
	else $(MAKE) -s --no-print-directory .venv/.satisfies$(addprefix -,$(1)) && bin="$$PWD/$(venv_bin)"; fi && \
	PATH="$$bin:$$PATH" && export PATH && echo "environment: $$bin" >&2

# Two processes of one thread each: two threads of one process gain little in small models, and wait long for each other.
pytest = OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile

.PHONY: help repro experiments lint test test-all report site clean

help:  ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'PYTHON=python3.12    another Python, 3.11 or newer'

repro:  ## make .venv if it is needed, run the stages that are out of date, print where the images are
	@$(call activate,) && python -m dit.cli check && python -m dvc repro && python -m dit.cli where

experiments:  ## what the experiments have reached, and in which settings they differ
	@$(call activate,) && python tools/experiments.py

lint:  ## style, format, spelling and types
	@$(call activate,test) && bash tools/lint.sh

test:  ## lint, and run the tests of every day
	@$(call activate,test) && bash tools/lint.sh && $(pytest)

test-all:  ## lint, and run all tests, the slow ones too
	@$(call activate,test) && bash tools/lint.sh && $(pytest) -m ""

report:  ## what changed since BASE (a git revision), as report.md and dvc_plots/index.html
	@$(call activate,) && bash tools/report.sh $(or $(BASE),origin/main)

site:  ## the pages of docs/ as a site, in site/; a broken link is an error
	@$(call activate,docs) && python -m mkdocs build

clean:  ## remove .venv, the site and the caches of the tools; data, models, samples and MLflow's runs stay
	rm -rf .venv site .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './.dvc/*' -prune -exec rm -rf {} +

.venv/.satisfies: pyproject.toml constraints.txt
	@$(call install,)

.venv/.satisfies-test .venv/.satisfies-docs: .venv/.satisfies-%: pyproject.toml constraints.txt
	@$(call install,$*)
	@touch .venv/.satisfies

# pip installs the project last, so an installation that was interrupted leaves no stamp and is repeated.
define install
$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
@test -x $(venv_bin)/python || { echo "making .venv" >&2; $(PYTHON) -m venv --clear .venv; } || \
	{ echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
@test -n "$$(ls -d .venv/*/*/site-packages/latent_dit-*.dist-info .venv/*/site-packages/latent_dit-*.dist-info 2> /dev/null)" && \
	$(venv_bin)/python tools/satisfies_pins.py $(1) 2> /dev/null || { \
	echo "installing the pinned packages into .venv: a few minutes, about 2 GB (7 GB with a CUDA build of torch)" >&2; \
	$(venv_bin)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.$(if $(1),[$(1)])' >&2 || \
	{ echo "pip could not install the pinned packages: see above; run the same command again to continue" >&2; exit 1; }; }
@touch $@
endef
