#!/usr/bin/env bash
# bash infer.sh CONFIG.yaml [generate|serve|bench|eval|plan|check] [--set section.key=value ...]
#
# Answers help and mistakes, finds or makes a Python with everything in requirements.txt (PYTHON=... names one), then
# hands over to python -m executor. Works from any directory and through links; decides nothing else.
if [ -z "${BASH_VERSION:-}" ]; then # sh infer.sh
    command -v bash >/dev/null 2>&1 || { echo "error: infer.sh needs bash, which is not installed here" >&2; exit 2; }
    exec bash "$0" "$@"
fi
set +o posix
set -euo pipefail

repo_root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
source "$repo_root/executor/scripts/find_python.sh"
source "$repo_root/executor/scripts/set_env.sh"
answer_before_set_up "$repo_root" "$@"
find_python "$recipes_path" requirements.txt

# An array cannot be exported: the launcher gets the nodes as words.
export RECIPE_NODES="${IPs[*]:-}"
export PYTHONPATH="$recipes_path${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON_FOUND" -m executor "$@"
