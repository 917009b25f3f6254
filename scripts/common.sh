# Sourced by the other scripts: one virtual environment for all of them.
#
# setup_env [EXTRA]   makes the environment if needed, installs this checkout with EXTRA (default: dev) into it, and puts
#                     it first on PATH. Says nothing and takes no time when there is nothing to do.
#
# setup_crypten       adds CrypTen, which tests of the interop compare with. Its own list of requirements cannot be installed:
#                     it names the dead package `sklearn`. After setup_env; quick and silent like it.
#
# setup_browser       installs the browser that the proxy's page is tested in, where it is missing and apt-get may be used;
#                     else says what to install, and the test of the page fails.
#
# PYTHON              the interpreter to make the environment with (default: python3.11, else python3)
# MPCINFER_VENV       where the environment is (default: .venv in this checkout)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# Runs a command in silence; shows what it said only if it fails.
quietly() {
    local said
    said="$("$@" 2>&1)" || {
        printf '%s\n' "$said" >&2
        return 1
    }
}

# Prints an interpreter that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "mpcinfer needs Python 3.11 or newer; ${PYTHON:-python3.11} is missing or older." \
        "Install Python 3.11, or name an interpreter: PYTHON=/path/to/python3.11 $0"
}

install_env() {
    local venv="$1" extra="$2" wanted stamp python
    # The stamp names the checkout too: an editable install of another checkout is not this one.
    wanted="$(printf '%s\n' "$ROOT" | cat - "$ROOT/setup.cfg" "$ROOT/pyproject.toml" | cksum)"
    if "$venv/bin/python" -c '' 2>/dev/null; then
        # dev contains all other extras.
        for stamp in "$venv/.installed-$extra" "$venv/.installed-dev"; do
            if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
        done
    fi
    rm -f "$venv"/.installed-*

    echo "Setting up $venv (once; PyTorch is a large download)." >&2
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        # A broken environment is made anew; nothing else is ever cleared.
        if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
            fail "$venv exists and is not a virtual environment; set MPCINFER_VENV to another place."
        fi
        python="$(find_python)" || exit 1
        quietly "$python" -m venv --clear "$venv" \
            || fail "Could not make a virtual environment in $venv (Debian and Ubuntu need the package python3.11-venv)."
    fi
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check -e "$ROOT[$extra]" \
        || fail "Could not install mpcinfer[$extra] into $venv. It needs the network, or a mirror in pip's configuration."
    printf '%s\n' "$wanted" >"$venv/.installed-$extra"
}

setup_env() {
    local venv="${MPCINFER_VENV:-$ROOT/.venv}"
    mkdir -p "$(dirname "$venv")"
    (
        # Two scripts started together must not install into one environment at once.
        if command -v flock >/dev/null; then flock 9; fi
        install_env "$venv" "${1:-dev}" 9>&-
    ) 9>"$venv.lock" || exit 1
    export PATH="$venv/bin:$PATH"
}

install_crypten() {
    local venv="$1" pip=("$1/bin/python" -m pip install --disable-pip-version-check)
    # Last what the check looks for, so that half an installation is no installation.
    if compgen -G "$venv/lib/python*/site-packages/crypten-0.4.1.dist-info" >/dev/null; then return; fi
    echo "Adding CrypTen to $venv (once)." >&2
    quietly "${pip[@]}" omegaconf pyyaml && quietly "${pip[@]}" --no-deps crypten==0.4.1 \
        || fail "Could not install crypten into $venv. It needs the network, or a mirror in pip's configuration."
}

setup_crypten() {
    local venv="${MPCINFER_VENV:-$ROOT/.venv}"
    (
        if command -v flock >/dev/null; then flock 9; fi
        install_crypten "$venv" 9>&-
    ) 9>"$venv.lock" || exit 1
}

setup_browser() {
    local packages="chromium chromium-driver" as_root=()
    if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then return; fi
    if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi
    if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
        echo "Installing $packages (once)." >&2
        # shellcheck disable=SC2086  # a word each
        if quietly "${as_root[@]}" apt-get update -q \
            && quietly "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
                apt-get install -y -q --no-install-recommends $packages; then
            return
        fi
    fi
    echo "The test of the proxy's page needs a browser: install $packages (as root). Without them it fails." >&2
}
