#!/bin/bash
# demo.sh - installs what is needed (Debian 12), builds, and packs, verifies and restores a genuine KV cache:
# 160 tokens of SmolLM2-135M, saved by llama.cpp (tests/data/README.md).
set -euo pipefail
cd "$(dirname "$0")/.."
tests/install-packages.sh build

echo "building ..."
cmake --preset release -G Ninja -DXKV_TESTS=OFF -DXKV_WERROR=OFF -B build-demo >build-demo.log ||
    { cat build-demo.log; exit 1; }
cmake --build build-demo -- --quiet
export PATH=$PWD/build-demo/cli:$PATH

cache=tests/data/smollm2-135m-jargon.ggsq
model=tests/data/smollm2-135m.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

field() { sed -n "s/.*\"$1\":\([^,}]*\).*/\1/p" <<<"$2"; }

row() { # NAME options...: pack, verify, restore
    local name=$1 json start end verified=no restored
    shift
    json=$(xkv-pack --json -q -f "$@" --model "$model" -o "$work/entry.xkv" "$cache")
    xkv-info --verify -q "$work/entry.xkv" && verified=yes
    start=$(date +%s%N)
    xkv-unpack -q -f --model "$model" -o "$work/restored" "$work/entry.xkv"
    end=$(date +%s%N)
    restored=approximate
    if cmp -s "$cache" "$work/restored"; then
        restored=identical
    fi
    printf '%-27s %10d %10d %6.2f %8.4f %8.4f %8.3f %10.3f  %-8s  %s\n' "$name" "$(field raw_bytes "$json")" \
        "$(field entry_bytes "$json")" "$(field ratio "$json")" "$(field K "$json")" "$(field V "$json")" \
        "$(field seconds "$json")" "$(awk "BEGIN{print ($end - $start) / 1e9}")" $verified $restored
    [ $verified = yes ]
}

echo
echo "SmolLM2-135M-Instruct, 160 tokens of the Jargon File, f16, saved by llama.cpp: $cache"
echo "error: relative error of the restored tensors (Frobenius norm), measured while packing"
echo
printf '%-27s %10s %10s %6s %8s %8s %8s %10s  %-8s  %s\n' "setting" "raw bytes" "packed" "ratio" "error K" "error V" \
    "pack s" "unpack s" "verified" "restored file"
row "--lossless" --lossless
row "--rank-k 76 --rank-v 115" --rank-k 76 --rank-v 115
row "--error 0.2" --error 0.2
row "--profile scalar --ratio 5" --profile scalar --ratio 5
row "--ratio 8" --ratio 8
echo
xkv-info -v "$work/entry.xkv" | sed -n 1,8p
echo "  ... (xkv-info -v shows every group)"

echo "A store: put it there, look a longer prompt up, restore what is stored of it, verify."
store=$work/store
(od -An -v -tu4 -j 12 -N 640 "$cache"; echo 1 2 3) >"$work/prompt" # its 160 token ids, and three more
xkv-store init "$store"
xkv-store put --model "$model" "$store" "$cache"
xkv-store match --model "$model" "$store" "$work/prompt"
xkv-store get -q --model "$model" -o "$work/prefix" "$store" "$work/prompt"
cmp "$cache" "$work/prefix" && echo "restored: identical"
xkv-store verify --decode "$store"
echo
echo "With a dictionary (xkv-train, xkv-pack -D) the ratio is several times higher; none is shipped, and one trained on"
echo "this very cache would prove nothing."
