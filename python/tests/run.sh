#!/bin/bash
# run.sh FOLDER [pytest options] - install the package from this tree into a virtual environment in FOLDER, and run its
# tests. Says SKIP (exit code 77) where PyPI cannot be reached. The C library is compiled once more, in FOLDER/build.
set -euo pipefail
package=$(cd "$(dirname "$0")/.." && pwd)
work=$1
shift
mkdir -p "$work"

skip() {
    echo "SKIP: $*"
    exit 77
}

if ! "$work/venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python3 -m venv --clear "$work/venv" >"$work/venv.log" 2>&1 || skip 'python3 -m venv does not work (Debian: python3-venv)'
fi
pip=("$work/venv/bin/python" -m pip --quiet --disable-pip-version-check --retries 1 --timeout 20)
"${pip[@]}" install 'scikit-build-core>=1.0' 'cffi>=1.15' 'numpy>=1.22' 'pytest>=7' 'mypy>=1.8' ml_dtypes xxhash zstandard >"$work/pip.log" 2>&1 ||
    { tail -n 3 "$work/pip.log"; skip 'what the package and its tests need cannot be installed from PyPI'; }

# From here on every failure is one of the package. Python code is taken from the installed copy, not from the tree.
"${pip[@]}" install --no-build-isolation --no-deps --force-reinstall --config-settings "build-dir=$work/build" "$package"
cd "$work"
PYTHONDONTWRITEBYTECODE=1 exec "$work/venv/bin/python" -m pytest -q -p no:cacheprovider "$@" "$package/tests"
