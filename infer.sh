#!/usr/bin/env bash
# bash infer.sh CONFIG.yaml [generate|serve|bench|eval|plan|check] [--set section.key=value ...]
#
# Finds or makes a Python with everything in requirements.txt (PYTHON=... names one), then hands over to
# python -m executor. Works from any directory; decides nothing else.
set -euo pipefail

repo_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$repo_root/executor/scripts/find_python.sh"
source "$repo_root/executor/scripts/set_env.sh"
find_python "$recipes_path" requirements.txt

# An array cannot be exported: the launcher gets the nodes as words.
export RECIPE_NODES="${IPs[*]:-}"
export PYTHONPATH="$recipes_path${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON_FOUND" -m executor "$@"
