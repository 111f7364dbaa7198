#!/usr/bin/env bash
# Times selection beside kvpress 0.5.5 on the same tensors and adds rows to results.json: peers.sh [ARGUMENTS OF peers.py]
# About a minute and 12 GiB on a GPU; --tiny --device cpu --out FOLDER shows that it runs.
#
# kvpress wants a transformers before 5.3, so it gets a folder of its own, $PEERS_SITE, which only its process sees. If
# that is not set, it is made from the wheels in $PEERS_WHEELS (.whl-peers in the repository's root), without a network:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl-peers kvpress==0.5.5 transformers==5.2.0 \
#     tokenizers==0.22.2 cachetools==5.5.2 termcolor==3.3.0 && pip wheel --no-deps -w .whl-peers fire==0.6.0
# Without either, kvpress has to be importable by $PEERS_PYTHON (the same python as ours, if not set).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
theirs=${PEERS_PYTHON:-$python}
wheels=${PEERS_WHEELS:-$root/.whl-peers}
site=${PEERS_SITE:-}
if [ -z "$site" ] && compgen -G "$wheels/*.whl" >/dev/null; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  "$theirs" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "$wheels"/*.whl || echo "the wheels in $wheels cannot be installed; going on without kvpress" >&2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
"$python" "$here/peers.py" --kvpress-python "$theirs" --site "$site" "$@"
