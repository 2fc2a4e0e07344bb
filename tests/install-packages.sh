#!/bin/bash
# install-packages.sh build|test|browser|package - install what .ci/packages.txt lists for building, and for testing, for
# looking at reports in a browser or for Debian packages, if it is missing.
set -euo pipefail
list=$(dirname "$0")/../.ci/packages.txt
mapfile -t packages < <(awk -v purpose="${1:-build}" '$1 == "build" || $1 == purpose && $1 != "#" {print $2}' "$list")

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    exit
fi
if ! command -v apt-get >/dev/null; then
    echo "install-packages.sh: this is not Debian; install the equivalents of: ${missing[*]}" >&2
    exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
fi
echo "installing: ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "${missing[@]}"
