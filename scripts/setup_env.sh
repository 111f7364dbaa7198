#!/usr/bin/env bash
# Makes .venv in the project's root and installs the package with pinned versions: setup_env.sh [EXTRAS]
# EXTRAS is a list such as "av,dev,deepspeed". Does nothing when .venv is already as asked. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-av}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: '$python' is not Python 3.11 or newer; set PYTHON to one that is" >&2
    exit 2
fi
[ -x .venv/bin/python ] || { echo "setup: making .venv"; "$python" -m venv .venv; }
wanted="$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16) $PWD"
for extra in ${extras//,/ }; do
    stamp=".venv/omnimem-$extra"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then missing=1; fi
done
if [ -n "${missing:-}" ]; then
    # torch alone first: a resolver that sees it installed leaves it as it is
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        torch=$(grep -E '^torch==' constraints.txt)
        echo "setup: installing $torch"
        .venv/bin/pip install --quiet --disable-pip-version-check "$torch"
    fi
    echo "setup: installing omnimem-train[$extras] (a minute or two the first time)"
    .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
    for extra in ${extras//,/ }; do echo "$wanted" > ".venv/omnimem-$extra"; done
fi
