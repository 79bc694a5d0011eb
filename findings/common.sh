# Sourced by every finding: `make_environment PACKAGE==VERSION...` gives $python with those packages and nothing else, in
# a temporary folder that goes away with the script.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

make_environment() {
    "${PYTHON:-python3}" -m venv "$folder/venv"
    python="$folder/venv/bin/python"
    local package
    # One after another: a torch named first keeps what follows from bringing its own.
    for package in "$@"; do
        "$python" -m pip --disable-pip-version-check install -q "$package"
    done
    "$python" -m pip --disable-pip-version-check freeze | grep -i -E "^($(printf '%s\n' "$@" | sed 's/[=<>[].*//' | paste -sd '|'))=="
}
