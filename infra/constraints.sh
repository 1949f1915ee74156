#!/usr/bin/env bash
# Write constraints.txt from the environment: versions only, without what a build of torch brings itself.
set -euo pipefail
cd "$(dirname "$0")/.."

new=$(mktemp)
trap 'rm -f "$new"' EXIT
sed -n '/^#/p;/^[^#]/q' constraints.txt >"$new"
.venv/bin/python -m pip --disable-pip-version-check list --format=freeze --exclude-editable |
    grep -vE '^(nvidia-|triton|cuda-|pip==|setuptools==|wheel==)' | sed 's/+[^ ]*$//' | LC_ALL=C sort -f >>"$new"
cat "$new" >constraints.txt
