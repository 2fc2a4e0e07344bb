# lib.sh - what the scripts of this folder use; CTest runs each as `NAME.sh TOOLS_FOLDER HELPERS_FOLDER DATA_FOLDER`.
#
#   run CODE COMMAND...   runs it; anything but exit code CODE fails the test. Output is kept in $out and $err.
#   out_is, err_is TEXT   exact comparison after numbers that differ between runs are replaced (see scrub)
#   out_has, err_has RE   an extended regular expression that some line matches
#   files_are NAME...     exactly these files are in the working folder, hidden ones included
# shellcheck shell=bash disable=SC2034 # the scripts use the variables
set -u
tools=$(cd "$1" && pwd) helpers=$(cd "$2" && pwd) data=$(cd "$3" && pwd)
PATH=$tools:$helpers:$PATH
export LC_ALL=C
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
mkdir "$work/tmp" "$work/w"
export TMPDIR=$work/tmp # to see what is left there
cd w || exit 1

out='' err='' failures=0 shown=''

fail() {
    failures=$((failures + 1))
    printf 'FAILED: %s\n  in: %s\n  stdout: %s\n  stderr: %s\n' "$1" "$shown" "$out" "$err"
}

run() {
    local expected=$1 code
    shift
    shown=$*
    "$@" >"$work/out" 2>"$work/err" </dev/null
    code=$?
    out=$(tr -d '\0' <"$work/out") err=$(tr -d '\0' <"$work/err")
    [ "$code" -eq "$expected" ] || fail "exit code $code, expected $expected"
}

# Seconds and versions differ between runs; sizes of entries may, since zstd versions differ.
scrub() {
    sed -E 's/[0-9]+\.[0-9]+ s$/T s/; s/[0-9]+\.[0-9]+\.[0-9]+/VERSION/
        s/[0-9.]+ [KM]?i?B/SIZE/g; s/\([0-9.]+x\)/(Rx)/'
}

is() { # WHAT FOUND EXPECTED
    [ "$2" = "$3" ] || fail "$1 should be: $3"
}
out_is() { is stdout "$(scrub <<<"$out")" "$1"; }
err_is() { is stderr "$(scrub <<<"$err")" "$1"; }
out_has() { grep -Eq -- "$1" <<<"$out" || fail "stdout should match: $1"; }
err_has() { grep -Eq -- "$1" <<<"$err" || fail "stderr should match: $1"; }

same() { cmp -s "$1" "$2" || fail "$1 and $2 differ"; }

files_are() {
    local found
    found=$(find . -mindepth 1 -printf '%P\n' | sort | tr '\n' ' ')
    is files "${found% }" "$*"
    found=$(ls -A "$TMPDIR")
    is 'temporary files' "$found" ''
}

flip_bit() { # FILE OFFSET
    local byte
    byte=$(od -An -tu1 -j "$2" -N 1 "$1")
    printf "%b" "\\$(printf '%03o' $((byte ^ 1)))" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

skip() {
    echo "SKIP: $1"
    exit 77
}

finish() {
    [ "$failures" -eq 0 ] || { echo "$failures failures"; exit 1; }
}
