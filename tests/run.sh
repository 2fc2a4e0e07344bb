#!/bin/bash
# run.sh - all default tests: installs what they need (Debian 12), then
#   1. layout of the sources and the scripts
#   2. gcc, Release, warnings are errors: all tests
#   3. clang, AddressSanitizer and UndefinedBehaviorSanitizer, warnings are errors: all tests
#   4. clang, ThreadSanitizer: the tests of threaded code
# Ends with a line "N passed, N failed, N skipped" and fails when a test did.
set -euo pipefail
cd "$(dirname "$0")/.."
tests/install-packages.sh test

passed=0 failed=0 skipped=0
wrapper=()

say() { printf '\n== %s ==\n' "$*"; }

check() { # NAME COMMAND...: a test that is not in CTest
    local name=$1
    shift
    if "$@"; then
        echo "$name: passed"
        passed=$((passed + 1))
    else
        echo "$name: FAILED"
        failed=$((failed + 1))
    fi
}

# Test cases of a JUnit file: those that cmocka reports inside a test, else the test itself.
count_cases() {
    awk '
        function number(line) { match(line, /[0-9]+ test/); return substr(line, RSTART, RLENGTH - 5) + 0 }
        /<testcase / { match($0, /status="[a-z]*/); status = substr($0, RSTART + 8, RLENGTH - 8); p = f = s = 0 }
        /\[  PASSED  \] [0-9]+ test/ { p += number($0) }
        /\[  FAILED  \] [0-9]+ test/ { f += number($0) }
        /\[  SKIPPED \] [0-9]+ test/ { s += number($0) }
        /<\/testcase>/ {
            if (status == "fail" && f == 0) f = 1
            else if (status == "run" && p + s == 0) p = 1
            else if (status != "run" && status != "fail") s++
            passed += p; failed += f; skipped += s
        }
        END { print passed + 0, failed + 0, skipped + 0 }' "$1"
}

# A processor that OpenBLAS does not know gets kernels a quarter as fast.
mend_openblas() { # XKV_PACK
    if [ -z "${OPENBLAS_CORETYPE:-}" ] && "$1" --version | grep -q OPENBLAS_CORETYPE; then
        export OPENBLAS_CORETYPE=Haswell
        echo "OPENBLAS_CORETYPE=$OPENBLAS_CORETYPE: OpenBLAS does not know this processor"
    fi
}

run_preset() { # PRESET [configure options]
    local preset=$1 junit=$PWD/build-$1/junit.xml p f s status=0
    shift
    if ! { cmake --preset "$preset" -G Ninja "$@" && cmake --build --preset "$preset" -- --quiet; } \
        >"build-$preset.log" 2>&1; then
        tail -n 50 "build-$preset.log"
        echo "$preset: the build FAILED"
        failed=$((failed + 1))
        return
    fi
    rm -f "$junit"
    mend_openblas "build-$preset/cli/xkv-pack"
    "${wrapper[@]}" ctest --preset "$preset" -j "$(nproc)" --output-junit "$junit" \
        --test-output-size-passed 10000000 || status=$?
    read -r p f s < <(count_cases "$junit")
    if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then
        f=1 # ctest itself failed
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

say "layout and scripts"
mapfile -t sources < <(find format kernels codec store cli tests python/src -name '*.[ch]' -o -name '*.cu' 2>/dev/null)
check clang-format clang-format --dry-run -Werror "${sources[@]}"
mapfile -t scripts < <(find .ci tests cli python/tests -name '*.sh' -o -path .ci/run -o -name '*.bash')
check shellcheck shellcheck -x -P SCRIPTDIR -s bash "${scripts[@]}"

say "gcc, Release"
run_preset release -DCMAKE_C_COMPILER=gcc
say "clang, AddressSanitizer and UndefinedBehaviorSanitizer"
run_preset asan-ubsan
say "clang, ThreadSanitizer"
if setarch -R true 2>/dev/null; then
    wrapper=(setarch -R) # old sanitizers do not start under much address randomization
fi
run_preset tsan

echo
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
