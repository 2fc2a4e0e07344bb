#!/bin/bash
# check.sh CMAKE BUILD_FOLDER C_COMPILER LIBDIR GENERATOR MAKE_PROGRAM - install the build, move the copy, and build
# programs against it.
set -euo pipefail
cmake=$1 build=$2 cc=$3 libdir=$4 generator=$5 make=$6
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/moved

say() { echo "== $*"; }

say "install"
"$cmake" --install "$build" --prefix "$work/first" >"$work/install.log"
mv "$work/first" "$prefix"
if grep -rl "$work/first" "$prefix/$libdir/pkgconfig" "$prefix/$libdir/cmake"; then
    echo "these files name the folder of the installation" >&2
    exit 1
fi
for file in include/xkv/{common,format,kernels,codec,store,hook}.h bin/xkv-{pack,unpack,info,train,store} \
    share/man/man1/xkv-{pack,unpack,info,train,store}.1 share/bash-completion/completions/xkv-{pack,unpack,info,train,store}; do
    test -e "$prefix/$file" || { echo "not installed: $file" >&2; exit 1; }
done
"$prefix/bin/xkv-info" --version

say "each header alone, C11 and C++17"
for header in common format kernels codec store hook; do
    echo "#include <xkv/$header.h>" | "$cc" -std=c11 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -x c \
        -I"$prefix/include" -
    echo "#include <xkv/$header.h>" | c++ -std=c++17 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -x c++ \
        -I"$prefix/include" -
done

say "the README's example is the one that is built here"
diff -u <(sed -n '/^#include <stdio.h>/,/^\/\* -----/p' "$here/consumer/engine.c" | head -n -2) \
    <(sed -n '/^#include <stdio.h>/,/^```/p' "$here/../../README.md" | head -n -1)

say "find_package, shared and static"
"$cmake" -S "$here/consumer" -B "$work/consumer" -G "$generator" -DCMAKE_MAKE_PROGRAM="$make" \
    -DCMAKE_C_COMPILER="$cc" -DCMAKE_PREFIX_PATH="$prefix" >"$work/configure.log" || { cat "$work/configure.log"; exit 1; }
"$cmake" --build "$work/consumer"
"$work/consumer/consumer_shared"
"$work/consumer/consumer_static"
"$work/consumer/engine_shared" "$work/store-of-shared"
"$work/consumer/engine_static" "$work/store-of-static"

say "pkg-config"
export PKG_CONFIG_PATH=$prefix/$libdir/pkgconfig
read -ra flags < <(pkg-config --cflags --libs xkv)
"$cc" -std=c11 "$here/consumer/consumer.c" -o "$work/consumer_pc" "${flags[@]}"
LD_LIBRARY_PATH=$prefix/$libdir "$work/consumer_pc"
# libxkv as an archive, what it needs as shared libraries (--static would ask for all of them as archives).
mapfile -t requires < <(pkg-config --print-requires-private xkv | awk '{print $1}')
read -ra flags < <(pkg-config --libs "${requires[@]}")
"$cc" -std=c11 -I"$prefix/include" "$here/consumer/consumer.c" -o "$work/consumer_pc_static" \
    "$prefix/$libdir/libxkv.a" "${flags[@]}" -pthread -lm
"$work/consumer_pc_static"
