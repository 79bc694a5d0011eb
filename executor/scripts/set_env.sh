# What infer.sh sources before it starts Python. These fields matter on Ascend devices only; leave them empty on a CPU.

# Addresses of all nodes in the order of their ranks, e.g. IPs=('192.168.0.1' '192.168.0.2'). Empty: this node alone.
IPs=()
# Root of this repository. Empty: found from where this file lies.
recipes_path=""
# Where the CANN toolkit is installed, e.g. /usr/local/Ascend/ascend-toolkit/latest. Empty: the environment has it.
cann_path=""
# Where the driver is installed, e.g. /usr/local/Ascend/driver. Empty: the environment has it.
driver_path=""

if [ -z "$recipes_path" ]; then
    recipes_path="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
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
        echo "error: executor/scripts/set_env.sh: cann_path=$cann_path has no set_env.sh; give the folder of the CANN toolkit" >&2
        exit 2
    fi
    # CANN's own scripts use variables before they set them.
    set +u
    source "$cann_script"
    set -u
fi

if [ -n "$driver_path" ]; then
    if [ ! -d "$driver_path/lib64" ]; then
        echo "error: executor/scripts/set_env.sh: driver_path=$driver_path has no lib64; give the folder of the driver" >&2
        exit 2
    fi
    export LD_LIBRARY_PATH="$driver_path/lib64/driver:$driver_path/lib64/common:$driver_path/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
