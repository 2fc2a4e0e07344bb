#!/bin/bash
# gpu.sh - everything that needs a GPU, in a few minutes:
#   1. build of the plug-in with the programs of tests/cuda/gpu, which need the CUDA toolkit and nothing else
#   2. correctness: operations against the CPU, with guards around all memory, odd shapes, damaged streams, graphs
#   3. entries restored into the memory of the GPU, attended to there, and packed from there, against the CPU: with the
#      libraries of .ci/packages.txt installed, or from a bundle that another machine has made
#   4. compute-sanitizer: memcheck, racecheck, initcheck, synccheck
#   5. the benchmark, beside the ceilings of the same process
# and one JSON document about it all. No network is needed.
#
#   tests/gpu.sh [--bundle DIR] [--out FILE]     FILE: default tests/bench/results/gpu-DATE.json
#   tests/gpu.sh make-bundle DIR                 without a GPU: build what 3 runs, with the libraries it needs, into DIR
#
# Exit code: 0 passed, 1 failed, 77 there is no GPU or no toolkit: nothing was tested.
set -euo pipefail
cd "$(dirname "$0")/.."

bundle='' out=tests/bench/results/gpu-$(date +%F).json

die() {
    echo "gpu.sh: $*" >&2
    exit 1
}

skip() {
    echo "SKIP: $*"
    exit 77
}

say() { printf '\n== %s ==\n' "$*"; }

# --- What is there ---------------------------------------------------------------------------------------------------

find_toolkit() {
    PATH=$PATH:/usr/local/cuda/bin
    command -v nvcc >/dev/null && command -v cmake >/dev/null
}

# One fact about the first device.
device_fact() { nvidia-smi --id=0 --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null | head -n 1; }

generator() { if command -v ninja >/dev/null; then echo Ninja; else echo 'Unix Makefiles'; fi; }

# The first library of .ci/packages.txt that is not installed; nothing when all are.
missing_library() {
    local module
    command -v pkg-config >/dev/null || { echo pkg-config && return; }
    for module in libzstd libxxhash jansson openblas lmdb libcrypto libsodium cmocka; do
        pkg-config --exists "$module" || { echo "$module" && return; }
    done
}

# --- The bundle ------------------------------------------------------------------------------------------------------

# Libraries that a program loads, but for those of the system and of CUDA.
libraries_of() {
    ldd "$1" | awk '$3 ~ /^\// {print $3}' | grep -vE '/(libc|libm|libdl|libpthread|librt|ld-linux[^/]*|libcuda|libcudart|libcublas|libcublasLt)\.so'
}

# What needs the whole library.
entry_programs='gpu_device_read gpu_device_direct gpu_device_attend gpu_device_pack gpu_device_svd'

build_entry_programs() { # ARCHITECTURE
    # shellcheck disable=SC2086
    cmake --preset cuda -G "$(generator)" -DCMAKE_CUDA_ARCHITECTURES="$1" &&
        cmake --build --preset cuda --target $entry_programs -- -j "$(nproc)"
}

make_bundle() {
    local program
    find_toolkit || die "nvcc or cmake is not there"
    build_entry_programs 80 >/dev/null
    mkdir -p "$1/lib"
    for program in $entry_programs; do
        cp "build-cuda/tests/cuda/gpu/$program" "$1/"
        libraries_of "$1/$program" | xargs -r -I{} cp -L {} "$1/lib/"
    done
    du -sh "$1"
}

# --- Results ---------------------------------------------------------------------------------------------------------

results='' failed=0 passed=0

record() { # NAME STATUS: passed, failed, or why it was not run
    results+="${results:+, }\"$1\": \"$2\""
    case $2 in
    passed) passed=$((passed + 1)) ;;
    failed) failed=$((failed + 1)) ;;
    esac
    echo "$1: $2"
}

check() { # NAME COMMAND...
    local name=$1 code=0
    shift
    "$@" || code=$?
    case $code in
    0) record "$name" passed ;;
    77) record "$name" skipped ;;
    *) record "$name" failed ;;
    esac
}

# Clocks in MHz, degrees, W.
state_names=clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit
state() { printf '"%s"' "$(device_fact "$state_names")"; }

write_results() { # BENCH
    mkdir -p "$(dirname "$out")"
    {
        printf '{\n"date": "%s",\n"commit": "%s",\n' "$(date -u +%FT%TZ)" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
        printf '"gpu": "%s",\n"driver": "%s",\n' "$(device_fact name)" "$(device_fact driver_version)"
        printf '"toolkit": "%s",\n' "$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')"
        printf '"clocks": {"fields": "%s", "before": %s, "after": %s},\n' "$state_names" "$before" "$(state)"
        printf '"checks": {%s},\n"benchmark":\n' "$results"
        cat "$1"
        printf '}\n'
    } >"$out"
    echo "results are in $out"
}

# --- Steps -----------------------------------------------------------------------------------------------------------

build() { # ARCHITECTURE
    cmake -S tests/cuda/gpu -B build-gpu -G "$(generator)" -DCMAKE_CUDA_ARCHITECTURES="$1" -DXKV_WERROR=ON &&
        cmake --build build-gpu --parallel "$(nproc)"
}

check_entries() { # ARCHITECTURE
    local missing program folder=build-cuda/tests/cuda/gpu
    missing=$(missing_library)
    if [ -n "$bundle" ]; then
        folder=$bundle
        export XKV_CUDA_PLUGIN="$PWD/build-gpu/libxkv_cuda.so" LD_LIBRARY_PATH="$bundle/lib:${LD_LIBRARY_PATH-}"
    elif [ -n "$missing" ]; then
        record entries "not run: $missing is not installed, and there is no --bundle"
        return
    elif ! build_entry_programs "$1" >build-cuda.log 2>&1; then
        tail -n 30 build-cuda.log
        record entries failed
        return
    fi
    for program in $entry_programs; do
        check "${program#gpu_device_}" "$folder/$program"
    done
}

check_sanitizers() {
    local tool program=${bundle:-build-cuda/tests/cuda/gpu}/gpu_device_attend
    for tool in memcheck racecheck initcheck synccheck; do
        if command -v compute-sanitizer >/dev/null; then
            check "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 build-gpu/gpu_check build-gpu/libxkv_cuda.so
        else
            record "$tool" "not run: compute-sanitizer is not installed"
        fi
    done
    # Blocks that share memory: what the emulation cannot see is a missing barrier.
    if command -v compute-sanitizer >/dev/null && [ -x "$program" ]; then
        check "racecheck, attention" env XKV_CUDA_PLUGIN="$PWD/build-gpu/libxkv_cuda.so" \
            LD_LIBRARY_PATH="${bundle:+$bundle/lib:}${LD_LIBRARY_PATH-}" \
            compute-sanitizer --tool racecheck --error-exitcode 1 "$program"
    fi
}

while [ $# -gt 0 ]; do
    case $1 in
    make-bundle)
        [ $# -eq 2 ] || die "make-bundle takes a folder"
        make_bundle "$2"
        exit
        ;;
    --bundle) bundle=$(cd "${2-}" && pwd) || die "--bundle takes a folder" && shift 2 ;;
    --out) out=${2-} && shift 2 ;;
    *) die "unknown argument $1" ;;
    esac
done

command -v nvidia-smi >/dev/null || skip "there is no nvidia-smi, hence no driver"
capability=$(device_fact compute_cap)
[ -n "$capability" ] || skip "the driver has no device"
find_toolkit || skip "nvcc or cmake is not there"

say "build for compute capability $capability"
build "${capability/./}" >build-gpu.log 2>&1 || { tail -n 50 build-gpu.log && die "the build failed"; }
say "operations"
check operations build-gpu/gpu_check build-gpu/libxkv_cuda.so
say "entries"
check_entries "${capability/./}"
say "compute-sanitizer"
check_sanitizers
say "benchmark"
before=$(state)
if build-gpu/gpu_bench build-gpu/libxkv_cuda.so >build-gpu/bench.json; then
    record benchmark passed
else
    record benchmark failed
    echo null >build-gpu/bench.json
fi
write_results build-gpu/bench.json
echo
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
