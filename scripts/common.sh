# Sourced by the other scripts: one virtual environment for all of them.
#
# setup_env [EXTRA]   makes the environment if needed, installs this checkout with EXTRA (default dev) into it, and puts
#                     it first on PATH. Silent and quick when there is nothing to do.
#
# PYTHON              the interpreter to make the environment with (default: python3.11)
# MPCINFER_VENV       where the environment is (default: .venv in this checkout)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# Prints an interpreter that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "mpcinfer needs Python 3.11 or newer, and '${PYTHON:-python3.11}' is missing or older." \
        "Install it, or name one: PYTHON=/path/to/python3.11 $0"
}

# Runs a command in silence; shows what it said only if it fails.
quietly() {
    local log
    log="$(mktemp)"
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

install_env() {
    local venv="$1" extra="$2" wanted python
    # The stamp names the checkout too: an editable install of another checkout is not this one.
    wanted="$(printf '%s\n' "$ROOT" | cat - "$ROOT/setup.cfg" "$ROOT/pyproject.toml" | cksum)"
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null || rm -f "$venv"/.installed-*
    # The dev extra contains all others.
    for stamp in "$venv/.installed-$extra" "$venv/.installed-dev"; do
        [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    done

    python="$(find_python)" || exit 1
    echo "setting up $venv (once; this downloads PyTorch and takes a few minutes)" >&2
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        quietly "$python" -m venv --upgrade "$venv" || fail "Could not make a virtual environment in $venv; see above."
    fi
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check -e "$ROOT[$extra]" \
        || fail "Could not install mpcinfer[$extra] into $venv; see above. It needs the network or a configured mirror."
    printf '%s\n' "$wanted" >"$venv/.installed-$extra"
}

setup_env() {
    local venv="${MPCINFER_VENV:-$ROOT/.venv}"
    (
        # Two scripts started together must not install into the same environment at once.
        if command -v flock >/dev/null; then flock 9; fi
        install_env "$venv" "${1:-dev}" 9>&-
    ) 9>"$venv.lock" || exit 1
    export PATH="$venv/bin:$PATH"
}
