#!/bin/bash
# rate_distortion.sh OPTION... - bytes against error of all profiles and of what they are held against; see --help and
# README.md.
# rate_distortion.sh record    - the recorded results anew: all models of XKV_SHARED_DIR, into tests/bench/results
# rate_distortion.sh check     - a short sweep that must not contradict itself
# rate_distortion.sh selftest  - the arithmetic alone
#
# Runs the first Python that has numpy: that of XKV_PYTHON, those of the cache folder, the system's. Without one it says
# SKIP.
# XKV_BIN         folder of the tools (not for selftest and --redraw)
# XKV_SHARED_DIR  folder with data/MODEL/{train,test}/*.ggsq, header.gguf, metric.safetensors (record and check)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/xkv
export PYTHONDONTWRITEBYTECODE=1
export OPENBLAS_NUM_THREADS=1 # of numpy, whose matrices are small; the tools bring threads of their own

python=
for candidate in ${XKV_PYTHON:+"$XKV_PYTHON"} "$cache"/{engine,reference}-venv/bin/python python3 /usr/bin/python3; do
    if "$candidate" -c 'import numpy' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "SKIP: no Python with numpy; XKV_PYTHON may name one"
    exit 77
fi

case ${1:-} in
    selftest) exec "$python" "$here/test_rate_distortion.py" ;;
    --redraw | --help) exec "$python" "$here/rate_distortion.py" "$@" ;;
esac
if [ ! -x "${XKV_BIN:-}/xkv-pack" ]; then
    echo "XKV_BIN must name the folder of the tools" >&2
    exit 1
fi

need_data() {
    if [ ! -d "${XKV_SHARED_DIR:-}/data" ]; then
        echo "SKIP: XKV_SHARED_DIR does not name a folder with data/MODEL"
        exit 77
    fi
}

case ${1:-} in
    record)
        need_data
        shift
        for data in "$XKV_SHARED_DIR"/data/*/; do
            lengths=$cache/lengths/$(basename "$data")
            if [ ! -d "$lengths" ]; then
                echo "no prompts of several lengths in $lengths: tests/engine/run.sh caches MODEL makes them"
                lengths=
            fi
            "$python" "$here/rate_distortion.py" --data "$data" ${lengths:+--lengths "$lengths"} \
                --out "$here/results/rate-distortion" "$@"
        done
        ;;
    check)
        need_data
        data=$(printf '%s\n' "$XKV_SHARED_DIR"/data/*/ | head -n 1)
        caches=("$data"/test/*.ggsq)
        exec "$python" "$here/rate_distortion.py" "${caches[0]}" --data "$data" --ratios 8 --groups 4 --check
        ;;
    *)
        exec "$python" "$here/rate_distortion.py" "$@"
        ;;
esac
