# find_python REPO_ROOT REQUIREMENTS_FILE...: sets PYTHON_FOUND to an interpreter that has everything those files name.
# Sourced by infer.sh and tests/run.sh.
#
# 1. PYTHON=... if the user names one: used as it is, or refused with what it lacks.
# 2. The python3 on PATH if it has everything.
# 3. .venv in the repository, made when it is not there. On a python3 that already has torch (an Ascend host) it builds
#    upon that torch and never touches it; else torch is installed first.
# The stamps in .venv are written last: a set-up that was interrupted is never taken for a whole one.

TORCH_FOR_VENV="torch==2.13.0"

PROGRESS_S=0.5
STILL_S=30 # where nobody watches, a sign of life so often

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

# Answers what needs no installation (help, a mistake in the command line, a recipe that is not there) with the python3
# that is there, whatever its age. One that cannot even do that leaves it to the real thing.
answer_before_set_up() {
    local root="$1" name status=0
    shift
    for name in "${PYTHON:-python3}" python3; do
        command -v "$name" >/dev/null 2>&1 || continue
        PYTHONPATH="$root" PYTHONDONTWRITEBYTECODE=1 "$name" -c 'import sys
if sys.version_info >= (3, 8):
    from executor.command_line import main
    sys.exit(main(sys.argv[1:]))' "$@" || status=$?
        break
    done
    case "$status" in
        64) exit 0 ;;
        65) exit 2 ;;
        141) exit 141 ;; # nobody reads any more
    esac
}

# pip would bring CUDA's libraries where nothing can use them, unless the user has told it where to look.
_warn_of_cuda() {
    if [ "$(uname -s)" != Linux ] || _shows_gpu || [ -n "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]; then
        return 0
    fi
    _say "no NVIDIA GPU here, but the usual torch brings gigabytes of CUDA libraries. For PyTorch's CPU build press"
    _say "Ctrl-C, set PIP_EXTRA_INDEX_URL to its CPU wheel index (see pytorch.org), and start again."
}

_pip() {
    "$PYTHON_FOUND" -m pip --disable-pip-version-check "$1" --progress-bar off "${@:2}"
}

# Where everything that a set-up does is written down; an error names it.
_open_log() {
    SETUP_LOG="$1/.cache/setup.log"
    if ! { mkdir -p "$1/.cache" && : >"$SETUP_LOG"; } 2>/dev/null; then SETUP_LOG="$(mktemp)"; fi
}

# What pip is doing, by the last line of the log that tells it: "torch-2.13.0 (190.3 MB)".
_latest() {
    sed -n -E -e 's/^ *(Downloading|Collecting|Using cached|Processing) +([^ ]*\/)?([^ /]+)( \([0-9.]+ [kMG]B\))?.*/\3\4/p' \
        -e 's/^ *Installing collected packages.*/unpacking what was downloaded/p' "$SETUP_LOG" |
        tail -n 1 | sed -E 's/-(py[0-9]|cp[0-9]|[0-9][^ ]*-(py|cp)[0-9])[^ ]*//; s/\.whl|\.tar\.gz//'
}

# Megabytes that the log's lines from number $1 on say were downloaded.
_downloaded_mb() {
    tail -n "+$1" "$SETUP_LOG" | awk '/^ *Downloading .*\([0-9.]+ [kMG]B\)/ {
        match($0, /\([0-9.]+ [kMG]B\)/); split(substr($0, RSTART + 1, RLENGTH - 2), size, " ")
        total += size[1] * (size[2] == "GB" ? 1000 : size[2] == "MB" ? 1 : 0.001)
    } END { printf "%.0f", total }'
}

# Shows that a stage goes on, until its parent ends it: the seconds and the latest package, over and over on one line of
# a terminal, else a line now and then.
_progress() {
    local words="$1" parent="$2" started=$SECONDS told=0 latest
    while sleep "$PROGRESS_S" && kill -0 "$parent" 2>/dev/null; do
        if [ -t 2 ]; then
            printf '\r\033[Kset-up: %s ... %d s  %s' "$words" $((SECONDS - started)) "$(_latest)" >&2
        elif [ $((SECONDS - started - told)) -ge "$STILL_S" ]; then
            told=$((SECONDS - started))
            latest="$(_latest)"
            _say "$words: still at it after $told s${latest:+: $latest}"
        fi
    done
}

# _stage WORDS COMMAND...: runs one stage of the set-up, its output in the log, and says how it went in one line.
_stage() {
    local words="$1" started=$SECONDS status=0 from watcher size
    shift
    from=$(($(wc -l <"$SETUP_LOG") + 1))
    [ -t 2 ] || _say "$words ..."
    # pip stays in the foreground, where Ctrl-C reaches it.
    _progress "$words" "$$" &
    watcher=$!
    { echo "== $words"; "$@"; } >>"$SETUP_LOG" 2>&1 || status=$?
    { kill "$watcher" && wait "$watcher"; } 2>/dev/null || true
    [ ! -t 2 ] || printf '\r\033[K' >&2
    if [ "$status" -ne 0 ]; then return "$status"; fi
    size="$(_downloaded_mb "$from")"
    if [ "$size" != 0 ]; then size=", $size MB downloaded"; else size=""; fi
    _say "$words: $((SECONDS - started)) s$size"
}

# The end of a set-up that failed: the log's last lines on the screen, and where the rest is.
_fail_with_log() {
    tail -n 15 "$SETUP_LOG" | sed 's/^/  | /' >&2
    _fail "$1. All of it is in $SETUP_LOG" 1
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
        _stage "installing torch ${TORCH_FOR_VENV#torch==}" _pip install "$TORCH_FOR_VENV" || return 1
    fi
    local files=() file names=()
    for file in "$@"; do
        files+=(-r "$file")
        names+=("$(basename "$file")")
    done
    local status=0
    _stage "installing what ${names[*]} names" \
        _pip install "${files[@]}" ${constraint:+--constraint "$constraint"} || status=1
    [ -z "$constraint" ] || rm -f "$constraint"
    return $status
}

# --system-site-packages shows a venv the packages of the interpreter that lies under all venvs. Where $1 is itself a
# venv (an activated one with its own torch), its packages are named to .venv by a .pth file.
_see_packages_of() {
    local folders own
    folders="$("$1" -c 'import sys, sysconfig
if sys.prefix != sys.base_prefix:
    print(*dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")), sep="\n")')"
    own="$("$PYTHON_FOUND" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    if [ -n "$folders" ]; then echo "$folders" >"$own/base_interpreter.pth"; fi
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
        _say "the first run makes .venv upon $base and its torch $torch_there; log: $SETUP_LOG"
    else
        _say "the first run makes .venv with $base, which takes a few minutes; log: $SETUP_LOG"
    fi
    rm -rf "$venv"
    _stage "making .venv" "$base" -m venv $system_site "$venv" ||
        _fail_with_log "$base -m venv failed. On Debian and Ubuntu the package python3-venv is needed"
    PYTHON_FOUND="$venv/bin/python"
    if [ -n "$torch_there" ]; then _see_packages_of "$base"; fi
    _install "$torch_there" "$@" ||
        _fail_with_log "pip could not install the requirements. Behind a mirror set PIP_INDEX_URL; offline, use an interpreter that has them: PYTHON=/path/to/python"
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

    # Checkouts may share one by a link: they share its lock, too.
    local venv
    venv="$(readlink -f "$root/.venv")"
    if _is_ready "$venv" "${files[@]}"; then
        PYTHON_FOUND="$venv/bin/python"
        return 0
    fi
    if ! { : >>"$venv.lock"; } 2>/dev/null; then
        _fail "the set-up needs to write .venv into $root, and that cannot be written (read-only, or another user's). Make it writable for the first run, run a copy of it, or name an interpreter that has everything in ${files[*]}: PYTHON=/path/to/python" 1
    fi
    # Two set-ups at the same time would tear each other's .venv down.
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$venv.lock"
        flock -n 9 || { _say "another set-up is running; waiting for it"; flock 9; }
    fi
    if ! _is_ready "$venv" "${files[@]}"; then
        _open_log "$root"
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
    _say "adding to .venv what it lacks; log: $SETUP_LOG"
    # The old stamps go first: what fails from here on must not leave a .venv that looks whole.
    rm -f "$venv"/.ready-*
    _install "$torch_there" "$@" || _fail_with_log "pip could not install the requirements"
}
