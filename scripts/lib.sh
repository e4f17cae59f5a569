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

# prepare_browser: Debian's Chromium, and a font, for the tests marked `browser`, where we may install
# it. Where we may not, they are left out, which fails no run.
prepare_browser() {
    local as_root=() said install
    if command -v chromium >/dev/null; then return; fi
    if ((EUID)); then as_root=(sudo -n); fi
    if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
        say_no_browser "it cannot be installed from here"
        return
    fi
    echo "[setup] installing chromium with apt-get; this takes a minute or two, once" >&2
    install='apt-get -qq update; apt-get -qq install --no-install-recommends chromium fonts-dejavu-core'
    if ! said=$("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive timeout 300 \
        sh -c "$install" 2>&1 >/dev/null </dev/null); then
        said=${said##*$'\n'}
        say_no_browser "${said:-apt-get came to no end}"
    fi
}

say_no_browser() {
    echo "[setup] no chromium, so tests marked \`browser\` are left out: $1" >&2
}
