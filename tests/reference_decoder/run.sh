#!/bin/bash
# run.sh [ARGUMENT...] - decode.py with the first Python that has numpy, zstandard and xxhash: that of XKV_PYTHON, that of
# the cache folder, the first one on the path, Debian's. Without one it says SKIP. To install one:
#     python3 -m venv ~/.cache/xkv/reference-venv
#     ~/.cache/xkv/reference-venv/bin/pip install --requirement tests/reference_decoder/requirements.txt
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cached=${XDG_CACHE_HOME:-$HOME/.cache}/xkv/reference-venv/bin/python
for python in ${XKV_PYTHON:+"$XKV_PYTHON"} "$cached" python3 /usr/bin/python3; do
    if "$python" -c 'import numpy, xxhash, zstandard' 2>/dev/null; then
        PYTHONDONTWRITEBYTECODE=1 exec "$python" "$here/decode.py" "$@"
    fi
done
echo "SKIP: no Python with numpy, zstandard and xxhash; XKV_PYTHON may name one"
exit 77
