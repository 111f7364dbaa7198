#!/usr/bin/env bash
# Speed and memory at the size of the 7B model.
#   run.sh              what the README's table shows, on the GPUs here (measure_all.sh), into results.json, and the table
#   run.sh ARGUMENTS    cases of bench.py, see run.sh --help; OMNIMEM_KERNELS=0 in front measures plain torch
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
if [ $# -gt 0 ]; then exec "$python" "$here/bench.py" "$@"; fi
"$python" "$here/bench.py" --cases ""   # says so where there is no GPU
work="$(mktemp -d)"
bash "$here/measure_all.sh" "$work"
cp "$work/results.json" "$here/results.json"
echo "wrote $here/results.json; logs are in $work"
"$python" "$here/table.py"
