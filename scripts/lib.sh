# shellcheck shell=bash
# Sourced by the entry points: goes to the repository's root, whatever the caller's folder.

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# A caller's own paths would put other code in front of this tree and its .venv.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1

PY="$PWD/.venv/bin/python"

# prepare [--lowest]: make .venv (or .venv-lowest), and install what is missing.
# $PYTHON names another interpreter than python3.
prepare() {
    "${PYTHON:-python3}" scripts/_setup.py "$@"
    if [[ ${1-} == --lowest ]]; then PY="$PWD/.venv-lowest/bin/python"; fi
}
