#!/bin/bash
# run.sh [live | server | fidelity | domains | speed | caches | blocks | states] MODEL [OPTION...] - restored caches in a real
# engine: llama.cpp, through llama-cpp-python.
#
# MODEL is smollm2 or qwen, for live and server also gemma. live tests reuse of prefixes by the Python package, in several
# processes, server the same with a llama-server, which it builds first (minutes). Instead of testing,
# fidelity sweeps ratios, domains packs texts unlike those of the training, speed sets a restore beside the prefill, and
# caches makes caches of one text at several lengths (each has a --help). blocks and states take no MODEL: blocks compares
# quantized rows with ggml's (XKV_TEST_BLOCKS: the program unit.blocks), states packs and cuts every kind of the engine's
# state files.
# Opt-in, because the first run installs about 1 GB from PyPI and builds the engine (minutes):
#     XKV_ENGINE_TESTS=1 ctest --test-dir build -R engine --verbose
# XKV_BIN         folder with xkv-pack and xkv-unpack (ctest sets it)
# XKV_SHARED_DIR  optional: folder with data/*/test/*.ggsq, for the cases on stored caches
set -euo pipefail
if [ -z "${XKV_ENGINE_TESTS:-}" ]; then
    echo "SKIP: XKV_ENGINE_TESTS is not set; XKV_ENGINE_TESTS=1 installs a real engine and tests with it"
    exit 77
fi
if [ ! -x "${XKV_BIN:-}/xkv-pack" ]; then
    echo "XKV_BIN must name the folder with xkv-pack and xkv-unpack" >&2
    exit 1
fi

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/xkv
venv=$cache/engine-venv
mkdir -p "$cache"
exec 9>"$cache/engine.lock" # one run at a time installs, converts and uses the cores
flock 9

# pip decides what is missing, so that an interrupted installation is completed by the next run.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "installing the engine and the models in $venv; this takes minutes"
    python3 -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --requirement "$here/requirements.txt"
"${pip[@]}" --force-reinstall --no-deps "$here/../../python" # compiled anew: it drives the engine

script=test_engine.py
case ${1:-} in
    live) script=live.py && shift ;;
    server) script=server.py && shift ;;
    fidelity) script=fidelity.py && shift ;;
    caches) script=make_caches.py && shift ;;
    domains) script=domains.py && shift ;;
    blocks) script=check_blocks.py && shift ;;
    states) script=check_states.py && shift ;;
    speed) script=restore_speed.py && shift ;;
esac
PYTHONDONTWRITEBYTECODE=1 exec "$venv/bin/python" "$here/$script" --cache "$cache" "$@"
