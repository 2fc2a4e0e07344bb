#!/bin/bash
# store-long.sh - the long forms of the store's tests, about 45 minutes: twice 2,000 killed writers, 8 processes of 4
# threads for 10 minutes, a hook under mixed load for another 10, a wrong bit in every byte of the index, a million entries.
set -euo pipefail
cd "$(dirname "$0")/.."
tests/install-packages.sh test
export XKV_LONG_TESTS=1
cmake --preset release -G Ninja >build-release.log
cmake --build --preset release -- --quiet
for test in store store_fault store_damage store_stress hook_save; do
    build-release/tests/unit/test_$test # without CTest, whose time is that of the short form
done
build-release/tests/bench/xkv_store_bench 1000000
