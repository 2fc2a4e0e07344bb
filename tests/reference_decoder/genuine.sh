#!/bin/bash
# genuine.sh - packs genuine caches with each profile and compares what xkv-unpack and decode.py make of the entries.
#
# XKV_BIN         folder of the tools (ctest sets it)
# XKV_DATA_DIR    folder with the cache that the repository ships (ctest sets it)
# XKV_SHARED_DIR  optional: folder with data/MODEL/header.gguf and data/MODEL/test/*.ggsq; the first cache of each model
set -euo pipefail
: "${XKV_BIN:?must name the folder of the tools}" "${XKV_DATA_DIR:?must name the folder of the shipped cache}"
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
"$here/run.sh" --help >"$work/help" || status=$?
if [ "$status" -ne 0 ]; then
    cat "$work/help"
    exit "$status"
fi

# check NAME MODEL CACHE [DICTIONARY [OPTION...]]: DICTIONARY may be empty.
check() {
    local name=$1 model=$2 cache=$3 dictionary=${4:+-D$4}
    shift 3
    [ $# -eq 0 ] || shift
    "$XKV_BIN/xkv-pack" -q -f --model "$model" ${dictionary:+"$dictionary"} "$@" "$cache" -o "$work/$name.xkv"
    "$XKV_BIN/xkv-unpack" -q -f ${dictionary:+"$dictionary"} "$work/$name.xkv" -o "$work/$name.ggsq"
    "$here/run.sh" "$work/$name.xkv" ${dictionary:+"$dictionary"} --compare "$work/$name.ggsq" | sed "s|$work/||"
}

check_all() {
    local model=$1 cache=$2
    echo "$cache"
    "$XKV_BIN/xkv-train" -q -f --model "$model" --cross 64 "$cache" -o "$work/trained.xkvd"
    check lossless "$model" "$cache" "" --lossless
    check svd "$model" "$cache" "" --profile svd --energy 0.99
    check svd-zstd "$model" "$cache" "" --profile svd --energy 0.91 --zstd-factors --sinks 0 --window 3
    check svdq "$model" "$cache" "" --profile svd --error 0.1
    check scalar "$model" "$cache" "" --profile scalar --error 0.1
    check dict "$model" "$cache" "$work/trained.xkvd" --quality 50
}

check_all "$XKV_DATA_DIR/smollm2-135m.gguf" "$XKV_DATA_DIR/smollm2-135m-jargon.ggsq"
for folder in ${XKV_SHARED_DIR:+"$XKV_SHARED_DIR"/data/*/}; do
    for cache in "$folder"test/*.ggsq; do
        [ -e "$cache" ] || continue
        check_all "${folder}header.gguf" "$cache"
        break
    done
done
