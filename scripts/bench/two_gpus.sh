#!/usr/bin/env bash
# Two GPUs of one machine against one, with DDP, DeepSpeed ZeRO-2 and ZeRO-3, and FSDP2: two_gpus.sh [ARGUMENTS OF two_gpus.py]
# Takes 7 minutes at most. Without DeepSpeed its parts are reported as failed and the rest runs; WHEELS=FOLDER in front
# installs it first, with what it needs, from the wheels in that folder.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --find-links "$WHEELS" deepspeed || echo "DeepSpeed could not be installed"
fi
exec "$python" "$here/two_gpus.py" "$@"
