# find_python REPO_ROOT REQUIREMENTS_FILE...: sets PYTHON_FOUND to an interpreter that has everything those files name.
# Sourced by infer.sh and tests/run.sh.
#
# 1. PYTHON=... if the user names one: used as it is, or refused with what it lacks.
# 2. The python3 on PATH if it has everything.
# 3. .venv in the repository, made when it is not there. On a python3 that already has torch (an Ascend host) it builds
#    upon that torch and never touches it; else torch is installed first.
# The stamps in .venv are written last: a set-up that was interrupted is never taken for a whole one.

TORCH_FOR_VENV="torch==2.13.0"

_say() { echo "set-up: $*" >&2; }

_fail() {
    echo "error: $1" >&2
    # The last line of every command is JSON, of this failure too.
    printf '{"command": "launch", "error": "%s"}\n' "$(printf '%s' "$1" | tr '\n\t' '  ' | sed 's/\\/\\\\/g; s/"/\\"/g')"
    exit "${2:-2}"
}

_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# The first interpreter on PATH that is new enough: python3, else one that has its version in its name.
_base_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if _is_new_enough "$name"; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

_shows_gpu() {
    [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null 2>&1
}

# pip would bring CUDA's libraries where nothing can use them, unless the user has told it where to look.
_warn_of_cuda() {
    if [ "$(uname -s)" != Linux ] || _shows_gpu || [ -n "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]; then
        return 0
    fi
    _say "this machine shows no NVIDIA GPU, but the usual torch package brings some gigabytes of CUDA libraries."
    _say "For PyTorch's CPU build, stop now (Ctrl-C), point PIP_INDEX_URL or PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel"
    _say "index (see the installation selector on pytorch.org), and start again."
}

_pip() {
    "$PYTHON_FOUND" -m pip --disable-pip-version-check "$@" >&2
}

# Installs what is missing into the interpreter of .venv. $1: the torch that is there already, or empty.
_install() {
    local torch_there="$1" constraint=""
    shift
    if [ -n "$torch_there" ]; then
        constraint="$(mktemp)"
        echo "torch==$torch_there" >"$constraint"
    else
        _warn_of_cuda
        _pip install "$TORCH_FOR_VENV" || return 1
    fi
    local files=() file
    for file in "$@"; do files+=(-r "$file"); done
    local status=0
    _pip install "${files[@]}" ${constraint:+--constraint "$constraint"} || status=1
    [ -z "$constraint" ] || rm -f "$constraint"
    return $status
}

_make_venv() {
    local venv="$1" base="$2" torch_there="" system_site=""
    shift 2
    torch_there="$("$base" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)"
    if [ -n "$torch_there" ] && "$base" "$scripts/check_packages.py" "$1" | grep -q '^torch is'; then
        _say "torch $torch_there of $base is outside $(grep '^torch' "$1"); .venv gets its own"
        torch_there=""
    fi
    if [ -n "$torch_there" ]; then
        system_site="--system-site-packages"
        _say "making .venv upon $base and its torch $torch_there"
    else
        _say "making .venv with $base; the first time this takes a few minutes"
    fi
    rm -rf "$venv"
    "$base" -m venv $system_site "$venv" >&2 ||
        _fail "$base -m venv failed: see above. On Debian and Ubuntu the package python3-venv is needed" 1
    PYTHON_FOUND="$venv/bin/python"
    _install "$torch_there" "$@" ||
        _fail "pip could not install the requirements: see above. Behind a mirror set PIP_INDEX_URL; offline, use an interpreter that has them: PYTHON=/path/to/python" 1
}

# The stamp of one requirement file: it says that .venv has what the file named when it was installed.
_stamp() {
    echo "$1/.ready-$(cksum <"$2" | cut -d' ' -f1)"
}

_is_ready() {
    local venv="$1" file
    shift
    [ -x "$venv/bin/python" ] || return 1
    for file in "$@"; do [ -f "$(_stamp "$venv" "$file")" ] || return 1; done
}

find_python() {
    local root="$1" files=() file base missing scripts
    scripts="$root/executor/scripts"
    shift
    for file in "$@"; do files+=("$root/$file"); done

    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || _fail "PYTHON=$PYTHON: there is no such interpreter"
        PYTHON_FOUND="$(command -v "$PYTHON")"
        _is_new_enough "$PYTHON_FOUND" || _fail "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1); Python 3.11 or newer is needed"
        missing="$("$PYTHON_FOUND" "$scripts/check_packages.py" "${files[@]}")" ||
            _fail "PYTHON=$PYTHON lacks what this project needs: $(echo "$missing" | paste -sd, - | sed 's/,/, /g'). Install it there ($PYTHON -m pip install -r ${files[*]}), or unset PYTHON"
        return 0
    fi

    base="$(_base_python)" ||
        _fail "Python 3.11 or newer is needed; found: $(python3 -V 2>&1 || true). Install one, or name it: PYTHON=/path/to/python3.11 bash infer.sh ..."
    if "$base" "$scripts/check_packages.py" "${files[@]}" >/dev/null 2>&1; then
        PYTHON_FOUND="$base"
        return 0
    fi

    local venv="$root/.venv"
    if _is_ready "$venv" "${files[@]}"; then
        PYTHON_FOUND="$venv/bin/python"
        return 0
    fi
    # Two set-ups at the same time would tear each other's .venv down.
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$root/.venv.lock"
        flock -n 9 || { _say "another set-up is running; waiting for it"; flock 9; }
    fi
    if ! _is_ready "$venv" "${files[@]}"; then
        if compgen -G "$venv/.ready-*" >/dev/null && [ -x "$venv/bin/python" ]; then
            _extend_venv "$venv" "${files[@]}"
        else
            _make_venv "$venv" "$base" "${files[@]}"
        fi
        missing="$("$venv/bin/python" "$scripts/check_packages.py" "${files[@]}")" ||
            _fail "the set-up left something out: $(echo "$missing" | paste -sd, -)" 1
        for file in "${files[@]}"; do touch "$(_stamp "$venv" "$file")"; done
        _say "done"
    fi
    PYTHON_FOUND="$venv/bin/python"
    if command -v flock >/dev/null 2>&1; then exec 9>&-; fi
}

# A whole .venv to which other requirement files are added, or whose own have changed.
_extend_venv() {
    local venv="$1" torch_there
    shift
    PYTHON_FOUND="$venv/bin/python"
    torch_there="$("$PYTHON_FOUND" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)"
    _say "adding to .venv what it lacks"
    # The old stamps go first: what fails from here on must not leave a .venv that looks whole.
    rm -f "$venv"/.ready-*
    _install "$torch_there" "$@" || _fail "pip could not install the requirements: see above" 1
}
