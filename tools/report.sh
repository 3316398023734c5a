#!/usr/bin/env bash
# What this branch changes, as a comment for a pull request: report.md, and dvc_plots/index.html with curves and pictures.
#   bash tools/report.sh [BASE]         compares the workspace with BASE, main of the remote `origin` by default
set -euo pipefail
name=${1:-origin/main}
git rev-parse --quiet --verify "$name^{commit}" >/dev/null || { echo "report: git knows no revision $name" >&2; exit 1; }

base=$(git merge-base "$name" HEAD) # what the branch began with, not what others have added since

section() { # title, command: its table, or a line that says that there is none
    printf '\n### %s\n\n' "$1"
    table=$("${@:2}")
    if [ "$(grep -c '^|' <<<"$table")" -gt 2 ]; then printf '%s\n' "${table//$base/$name}"; else echo 'No change.'; fi
}

{
    printf '## What changes against `%s`\n' "$name"
    section Metrics python -m dvc metrics diff "$base" --md
    section Parameters python -m dvc params diff "$base" --md
} >report.md
rm -rf dvc_plots
python -m dvc plots diff "$base" --out dvc_plots >/dev/null
echo "report.md dvc_plots/index.html"
