#!/bin/bash
# deb.sh CMAKE CPACK C_COMPILER GENERATOR MAKE_PROGRAM - build the Debian packages, look into them, unpack them, run their
# tools and build a program against them.
set -euo pipefail
cmake=$1 cpack=$2 cc=$3 generator=$4 make=$5
here=$(cd "$(dirname "$0")" && pwd)
source=$here/../..
for command in dpkg-deb dpkg-shlibdeps file gzip; do
    command -v "$command" >/dev/null || { echo "SKIP: needs $command (packages dpkg-dev and file)"; exit 77; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

say() { echo "== $*"; }
die() { echo "$*" >&2; exit 1; }
logged() { "$@" >log 2>&1 || { cat log; die "failed: $*"; }; }

say "build"
(cd "$source" && "$cmake" --preset deb -B "$work/build" -G "$generator" -DCMAKE_MAKE_PROGRAM="$make" \
    -DCMAKE_C_COMPILER="$cc") >log 2>&1 || { cat log; die "cannot configure"; }
logged "$cmake" --build build --parallel "$(nproc)"
(cd build && logged "$cpack" -B "$work/packages")
rm build/libxkv.so* # what runs below is what was packed

say "names and versions"
version=$(sed -n 's/^CMAKE_PROJECT_VERSION:STATIC=//p' build/CMakeCache.txt)
architecture=$(dpkg --print-architecture)
found=$(cd packages && ls -- *.deb)
expected=$(printf '%s\n' {libxkv-dev,libxkv0,xkv-tools}_"$version-1_$architecture.deb")
[ "$found" = "$expected" ] || die "packages are $found, expected $expected"

field() { dpkg-deb -f packages/"$1"_*.deb "$2"; }
depends() { # PACKAGE REGEX
    field "$1" Depends | grep -Eq "(^|, )$2(,|$)" || die "$1 does not depend on $2: $(field "$1" Depends)"
}
for library in 'libzstd1 \(>= [0-9.]+\)' 'libxxhash0 \(>= [0-9.]+\)' 'libc6 \(>= [0-9.]+\)' 'libopenblas0[^,]*' \
    'liblmdb0 \(>= [0-9.]+\)' 'libssl3 \(>= [0-9.]+\)' 'libsodium23 \(>= [0-9.]+\)'; do
    depends libxkv0 "$library"
done
depends libxkv-dev "libxkv0 \(= $version-1\)"
depends libxkv-dev libzstd-dev
depends xkv-tools "libxkv0 \(= $version-1\)"
depends xkv-tools 'libjansson4 \(>= [0-9.]+\)'

say "contents"
for deb in packages/*.deb; do
    # Names of a Debian system, owned by root; nothing is executable but programs, nothing writable but by its owner.
    dpkg-deb -c "$deb" | awk '
        $2 != "root/root" { print "owner: " $0; bad = 1 }
        /^d/ && $1 != "drwxr-xr-x" { print "mode: " $0; bad = 1 }
        /^-/ && $1 != ($6 ~ "^./usr/bin/" ? "-rwxr-xr-x" : "-rw-r--r--") { print "mode: " $0; bad = 1 }
        $6 !~ "^./usr/((bin|include/xkv|lib/[a-z0-9_]+-linux-gnu[a-z0-9_]*|share/(man/man1|doc|bash-completion))/|[a-z/_0-9-]*/?$)" {
            print "place: " $0; bad = 1 }
        END { exit bad }' || die "$deb: see above"
    dpkg-deb -e "$deb" control
    dpkg-deb -x "$deb" root
    (cd root && md5sum --quiet -c ../control/md5sums)
    name=$(dpkg-deb -f "$deb" Package)
    test -s "root/usr/share/doc/$name/copyright" || die "$name: no copyright"
    gzip -dc "root/usr/share/doc/$name/changelog.Debian.gz" | grep -q "^xkv ($version-1)" || die "$name: changelog"
    rm -r control
done
lib=$(dirname "$(find root -name libxkv.so.0)")
[ "$(readlink "$lib/libxkv.so.0")" = "libxkv.so.$version" ] || die "libxkv.so.0 leads elsewhere"
for name in pack unpack info train store; do
    gzip -t "root/usr/share/man/man1/xkv-$name.1.gz"
    bash -n "root/usr/share/bash-completion/completions/xkv-$name"
done
for binary in root/usr/bin/* "$lib/libxkv.so.0"; do
    dynamic=$(readelf -d "$binary")
    grep -Eq 'R(UN)?PATH' <<<"$dynamic" && die "$binary: has a path to its libraries"
    readelf -S "$binary" | grep -q '\.symtab' && die "$binary: is not stripped"
    grep -q 'BIND_NOW' <<<"$dynamic" || die "$binary: is not hardened"
done
if grep -rlF -e "$work" -e "$(cd "$source" && pwd)" root; then
    die "these files name folders of the build"
fi
if command -v lintian >/dev/null; then
    lintian --allow-root --fail-on error packages/*.deb
fi

say "the tools"
export LD_LIBRARY_PATH=$work/$lib
PATH=$work/root/usr/bin:$PATH
cp "$source/tests/data/smollm2-135m-jargon.ggsq" a
[ "$(xkv-info --version | head -n 1)" = "xkv-info $version" ] || die "another version"
xkv-pack -q a
xkv-info --verify a.xkv
xkv-unpack -q -o b a.xkv
cmp a b

say "a program"
export PKG_CONFIG_SYSROOT_DIR=$work/root PKG_CONFIG_PATH=$work/$lib/pkgconfig
read -ra flags < <(pkg-config --cflags --libs xkv)
"$cc" -std=c11 "$here/consumer/consumer.c" -o consumer -I"$work/root/usr/include" -L"$work/$lib" "${flags[@]}"
./consumer
unset PKG_CONFIG_SYSROOT_DIR PKG_CONFIG_PATH
logged "$cmake" -S "$here/consumer" -B consumers -G "$generator" -DCMAKE_MAKE_PROGRAM="$make" -DCMAKE_C_COMPILER="$cc" \
    -DCMAKE_PREFIX_PATH="$work/root/usr" -DCMAKE_LIBRARY_ARCHITECTURE="$(dpkg-architecture -qDEB_HOST_MULTIARCH)"
logged "$cmake" --build consumers
consumers/consumer_shared
consumers/consumer_static
