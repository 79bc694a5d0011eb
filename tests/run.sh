#!/usr/bin/env bash
# bash tests/run.sh [PYTEST ARGUMENTS...]: set-up, lint, and the test suite; pytest's closing line is the last.
#
# Without arguments the whole suite runs, spread over WORKERS processes (default: the cores, at most 8).
# With arguments they are pytest's own: bash tests/run.sh tests/recipe -k degrees
if [ -z "${BASH_VERSION:-}" ]; then # sh tests/run.sh
    command -v bash >/dev/null 2>&1 || { echo "error: tests/run.sh needs bash, which is not installed here" >&2; exit 2; }
    exec bash "$0" "$@"
fi
set +o posix
set -euo pipefail

repo_root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"
cd "$repo_root"
source executor/scripts/find_python.sh
find_python "$repo_root" requirements.txt requirements-test.txt

# transformers' default image and video processors are references in the tests and are built on torchvision. It lies
# apart from the environment: --no-deps keeps it from bringing a torch of its own.
torchvision_dir="${TORCHVISION_DIR:-$repo_root/.cache/torchvision}"
if [ ! -d "$torchvision_dir/torchvision" ] && ! "$PYTHON_FOUND" -c 'import torchvision' >/dev/null 2>&1; then
    case "$("$PYTHON_FOUND" -c 'import importlib.metadata as m; print(m.version("torch"))')" in
        2.13.*) torchvision="torchvision==0.28.0" ;;
        *) torchvision="torchvision" ;;
    esac
    echo "set-up: $torchvision, for references in tests, into $torchvision_dir" >&2
    rm -rf "$torchvision_dir.partial"
    if "$PYTHON_FOUND" -m pip --disable-pip-version-check install --quiet --no-deps \
        --target "$torchvision_dir.partial" "$torchvision" >&2; then
        mkdir -p "$(dirname "$torchvision_dir")"
        mv "$torchvision_dir.partial" "$torchvision_dir"
    else
        echo "set-up: without $torchvision the tests that compare with it are skipped" >&2
    fi
fi

# The real torch_npu, for the emulator; apart from the environment as well, where it would break torch without CANN.
"$PYTHON_FOUND" -c 'from emulator.stubs import require_wheel; require_wheel(install=True)' >&2 ||
    echo "set-up: without torch_npu the tests on emulated chips are skipped" >&2

"$PYTHON_FOUND" -m ruff check .
"$PYTHON_FOUND" -m ruff format --check .

workers="${WORKERS:-$("$PYTHON_FOUND" -c 'from executor.host.limits import host_cores; print(min(host_cores(), 8))')}"
# A thread for each worker: tiny matrices gain nothing from more, and threads of several workers stand in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ $# -gt 0 ] || [ "$workers" -le 1 ]; then
    exec "$PYTHON_FOUND" -m pytest "$@"
fi
# In the order of tests/conftest.py, longest files first, so that all workers end together.
exec "$PYTHON_FOUND" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder -q
