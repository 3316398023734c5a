#!/usr/bin/env bash
# Style, format, spelling and types, as `make lint` and `make test` check them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -m ruff check .
python -m ruff format --check .
python -m codespell_lib
python -m mypy
