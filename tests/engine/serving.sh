#!/bin/bash
# serving.sh [pytest options] - the adapters of the Python package between the real classes of vLLM, LMCache and SGLang:
# their abstract classes, factories, keys, host pools and vLLM's scheduler, with torch tensors in CPU memory. No model runs.
#
# Opt-in, because the first run downloads about 4 GB from PyPI (torch, and the engines' packages, of which only Python code
# and what has no GPU part is imported):
#     XKV_ENGINE_TESTS=1 ctest --test-dir build -R engine.serving --verbose
# Needs Python 3.10 to 3.13.
set -euo pipefail
if [ -z "${XKV_ENGINE_TESTS:-}" ]; then
    echo "SKIP: XKV_ENGINE_TESTS is not set; XKV_ENGINE_TESTS=1 installs torch and tests with classes of vLLM, LMCache, SGLang"
    exit 77
fi

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/xkv
venv=$cache/serving-venv
engines=$cache/serving-engines
mkdir -p "$engines"
exec 9>"$cache/engine.lock" # one run at a time installs and uses the cores
flock 9

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "installing torch and others in $venv; this takes minutes"
    python3 -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install --requirement "$here/requirements-serving.txt" 'scikit-build-core>=1.0' 'cffi>=1.15' 'pytest>=7'
"${pip[@]}" install --force-reinstall --no-deps "$here/../../python"

path=
for package in vllm==0.33.0 lmcache==0.5.6 sglang==0.5.23; do
    folder=$engines/$package
    if [ ! -e "$folder" ]; then
        echo "downloading $package"
        rm -rf "$folder.new"
        "${pip[@]}" download --no-deps --only-binary :all: --dest "$folder.new" "$package"
        "$venv/bin/python" -m zipfile -e "$folder.new"/*.whl "$folder.new"
        # vLLM's kernels, most of it, are for GPUs; without them it takes no platform to be there.
        rm "$folder.new"/*.whl
        find "$folder.new/vllm" -name '*.so' -delete 2>/dev/null || true
        mv "$folder.new" "$folder"
    fi
    path=$folder:$path
done

tests=$here/../../python/tests
PYTHONPATH=$path XKV_REAL_ENGINES=1 PYTHONDONTWRITEBYTECODE=1 exec "$venv/bin/python" -m pytest -q -p no:cacheprovider "$@" \
    "$tests/test_vllm.py" "$tests/test_lmcache.py" "$tests/test_sglang.py" "$tests/test_real_engines.py"
