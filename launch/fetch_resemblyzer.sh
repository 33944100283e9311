#!/usr/bin/env bash
# fetch_resemblyzer.sh VENV: makes models/resemblyzer with the mpinfer of VENV, unless it is there.
#
# The weights come inside the Python package Resemblyzer; the code is jobs/speaker.py. What only training needs is left
# out. The model directory appears only once it is whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1
model=models/resemblyzer
[[ ! -e $model/weights.pt ]] || exit 0

mkdir -p models
work=$(mktemp -d models/.fetch.XXXXXX) # beside the model, so that the last step is a rename
trap 'rm -rf "$work"' EXIT

echo "fetch_resemblyzer.sh: making $model" >&2
"$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" resemblyzer==0.1.4
"$venv/bin/python" -m zipfile -e "$work"/?esemblyzer-*.whl "$work"
mkdir "$work/model"
"$venv/bin/python" - "$work/resemblyzer/pretrained.pt" "$work/model/weights.pt" <<'PYTHON'
import sys

import torch

state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)["model_state"]
torch.save({name: tensor for name, tensor in state.items() if not name.startswith("similarity_")}, sys.argv[2])
PYTHON
mv -T "$work/model" "$model"
