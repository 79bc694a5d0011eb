#!/usr/bin/env bash
# bash infer.sh CONFIG.yaml [generate|serve|bench|eval|plan|check] [--set section.key=value ...]
#
# Finds or makes a Python with everything in requirements.txt (PYTHON=... names one), then hands over to
# executor.apps.launch. Works from any directory; decides nothing else.
set -euo pipefail

repo_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$repo_root/executor/scripts/find_python.sh"
find_python "$repo_root" requirements.txt
source "$repo_root/executor/scripts/set_env.sh"

export PYTHONPATH="$repo_root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON_FOUND" -m executor.apps.launch "$@"
