#!/bin/bash
# check.sh LIBRARY [--update] - compare the symbols that LIBRARY exports with symbols.txt, or write that list anew.
set -euo pipefail
list=$(dirname "$0")/symbols.txt
found=$(nm --dynamic --defined-only --format=posix "$1" | awk '{print $1}' | LC_ALL=C sort)

if [ "${2-}" = --update ]; then
    printf '%s\n' "$found" >"$list"
    exit
fi
if grep -v '^xkv_' <<<"$found"; then
    echo "these exported symbols do not begin with xkv_" >&2
    exit 1
fi
if ! diff -u --label symbols.txt "$list" --label "$1" - <<<"$found"; then
    echo "the exported symbols differ from tests/abi/symbols.txt" >&2
    exit 1
fi
