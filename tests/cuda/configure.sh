#!/bin/bash
# configure.sh CMAKE SOURCE_FOLDER GENERATOR - XKV_CUDA without a toolkit: ON stops and names the flag to change, AUTO and
# OFF go on and say so; another value is refused.
set -euo pipefail
cmake=$1 source=$2 generator=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

configure() { # VALUE EXPECTED_STATUS TEXT
    local status=0
    "$cmake" -S "$source" -B "$work/$1" -G "$generator" -DXKV_CUDA="$1" -DXKV_TESTS=OFF -DXKV_TOOLS=OFF \
        -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON >"$work/log" 2>&1 || status=1
    tr -s ' \n' ' ' <"$work/log" >"$work/text" # CMake breaks lines
    if [ "$status" -ne "$2" ] || ! grep -q -- "$3" "$work/text"; then
        cat "$work/log"
        echo "XKV_CUDA=$1: status $status, expected $2 and: $3"
        exit 1
    fi
}

configure ON 1 'no CUDA toolkit was found.*Configure with -DXKV_CUDA=OFF'
configure AUTO 0 'CUDA backend: not built, no CUDA toolkit was found'
configure OFF 0 'CUDA backend: not built, XKV_CUDA=OFF'
configure maybe 1 'it must be AUTO, ON or OFF'
