#!/usr/bin/env bash
# make_venv.sh DIR EXTRAS: the virtual environment DIR, with this checkout as mpinfer[EXTRAS] in it.
#
# Does nothing when DIR is up to date. One that is half-made, broken or of another checkout is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1 extras=$2
python=${PYTHON:-python3}
constraints=${MPINFER_CONSTRAINTS:-launch/constraints.txt}
stamp=$venv/mpinfer-installed # a line for each set of extras, written once its installation is whole

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "make_venv.sh: $python is not Python 3.11 or newer; set PYTHON to one that is" >&2
    exit 2
fi

inputs=$(cat pyproject.toml "$constraints" | sha256sum | cut -c -64)
is_ours='import os, sys, mpinfer; sys.exit(not os.path.samefile(mpinfer.__path__[0], "mpinfer"))'
"$venv/bin/python" -I -c "$is_ours" 2>/dev/null || rm -f "$stamp"

if ! grep -qsxF "$inputs $extras" "$stamp"; then
    echo "make_venv.sh: installing mpinfer[$extras] into $venv; the first time takes minutes" >&2
    [[ -s $stamp ]] || "$python" -m venv --clear "$venv"
    others=$(grep -sF "$inputs" "$stamp" || true)
    rm -f "$stamp"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable ".[$extras]"
    printf '%s\n' "$inputs $extras" ${others:+"$others"} >"$stamp"
fi
