# The fields of a node, which infer.sh sources. On one machine there is nothing to fill in.

# Addresses of all nodes of a job in the order of their ranks, alike on every node, each typing the same command:
# IPs=('192.168.0.1' '192.168.0.2'). Empty (or placeholders): this machine alone. Without NPUs the number of addresses
# is the number of nodes. docs/multi_node.md tells more.
IPs=()
# Root of this repository. Empty: found from where this file lies.
recipes_path=""
# Where the CANN toolkit is installed, e.g. /usr/local/Ascend/ascend-toolkit/latest. Empty: the environment has it.
cann_path=""
# Where the driver is installed, e.g. /usr/local/Ascend/driver. Empty: the environment has it.
driver_path=""

if [ -z "$recipes_path" ]; then
    recipes_path="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
elif [ ! -f "$recipes_path/executor/__main__.py" ]; then
    _fail "executor/scripts/set_env.sh: recipes_path=$recipes_path is not this repository; give its root, or leave it empty"
fi

if [ -n "$cann_path" ]; then
    cann_script=""
    for candidate in "$cann_path/set_env.sh" "$cann_path/../set_env.sh" "$cann_path/bin/setenv.bash"; do
        if [ -f "$candidate" ]; then
            cann_script="$candidate"
            break
        fi
    done
    if [ -z "$cann_script" ]; then
        _fail "executor/scripts/set_env.sh: cann_path=$cann_path has no set_env.sh; give the folder of the CANN toolkit"
    fi
    # CANN's own scripts use variables before they set them.
    set +u
    source "$cann_script"
    set -u
fi

if [ -n "$driver_path" ]; then
    if [ ! -d "$driver_path/lib64" ]; then
        _fail "executor/scripts/set_env.sh: driver_path=$driver_path has no lib64; give the folder of the driver"
    fi
    export LD_LIBRARY_PATH="$driver_path/lib64/driver:$driver_path/lib64/common:$driver_path/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
