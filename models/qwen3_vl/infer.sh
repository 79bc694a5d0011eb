#!/usr/bin/env bash
# bash infer.sh CONFIG.yaml ...: the repository's own infer.sh, for those who stand in this folder.
exec bash "$(dirname "$(readlink -f "$0")")/../../infer.sh" "$@"
