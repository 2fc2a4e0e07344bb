# Where outputs go, and where they do not.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

make_ggsq >a
run 0 xkv-pack -q a
cp a.xkv good

# An existing output is kept without -f, and replaced whole with it.
echo precious >out
run 1 xkv-pack -q -o out a
err_is 'xkv-pack: out: already exists; use -f to overwrite it'
is out "$(cat out)" precious
chmod 640 out
run 0 xkv-pack -q -f -o out a
same out good
is mode "$(stat -c %a out)" 640
run 1 xkv-unpack -q a.xkv
err_is 'xkv-unpack: a: already exists; use -f to overwrite it'
run 0 xkv-unpack -q -f -k a.xkv

# The output is the input, by name or by another one.
ln a hard
ln -s a soft
for name in a ./a hard soft; do
    run 2 xkv-pack -q -f -o $name a
    err_is "xkv-pack: $name: is the input as well"
done
mkdir folder
run 1 xkv-pack -q -f -o folder a
err_is 'xkv-pack: folder: is a folder'
run 1 xkv-pack -q -o nowhere/out a
err_has '^xkv-pack: nowhere/out: .*No such file or directory'
run 2 xkv-unpack -q good
err_is 'xkv-unpack: good: the name does not end in .xkv; use -o'
rm -rf hard soft folder out

# Streams.
run 0 sh -c 'xkv-pack -q <a >out'
same out good
run 0 sh -c 'cat a | xkv-pack -q | cat >out'
same out good
run 0 sh -c 'cat a | xkv-pack -q - -o - >out'
same out good
run 0 sh -c 'xkv-pack -q -f -o out - <a'
same out good
run 0 sh -c 'xkv-pack -q -c a | xkv-unpack -q >back'
same a back
run 0 bash -c 'xkv-pack -q -c <(cat a) >out'
same out good
run 2 sh -c 'cat a | xkv-pack -q --json'
err_is 'xkv-pack: stdin: has no name to derive that of the output from; use -o'
run 0 sh -c 'cat a | xkv-pack -q --json -f -o out'
out_has '^\{"file":"stdin","ok":true,"output":"out",'
run 0 xkv-pack -q -f -o /dev/null a
[ -c /dev/null ] || fail '/dev/null was replaced'
rm -f out back

# A full disk: a device, and a file-size limit.
run 1 xkv-pack -q -o /dev/full a
err_has '^xkv-pack: /dev/full: .*No space left on device'
run 1 sh -c 'xkv-pack -q -c a >/dev/full'
err_has '^xkv-pack: stdout: .*No space left on device'
make_ggsq tokens=1000 >big
rm a.xkv
run 1 bash -c 'ulimit -f 20; xkv-pack -q big'
err_has '^xkv-pack: big: .*File too large'
run 0 xkv-pack -q -o big2.xkv big
run 1 bash -c 'ulimit -f 20; xkv-unpack -q big2.xkv'
err_has '^xkv-unpack: big2\.xkv: .*File too large'
files_are a big big2.xkv good

# A reader that goes away.
run 0 bash -c 'xkv-pack -q -c big | head -c 10 >/dev/null'
# shellcheck disable=SC2016 # bash -c expands it
run 1 bash -c '(sleep 0.5; xkv-pack -q -c big) | true; exit "${PIPESTATUS[0]}"'
err_has '^xkv-pack: stdout: .*Broken pipe$'
# shellcheck disable=SC2016
run 1 bash -c '(sleep 0.5; xkv-pack -q -f --json -o big2.xkv big) | true; exit "${PIPESTATUS[0]}"'
err_is 'xkv-pack: standard output: Broken pipe'
# shellcheck disable=SC2016
run 1 bash -c '(sleep 0.5; xkv-info -v big2.xkv) | true; exit "${PIPESTATUS[0]}"'
err_is 'xkv-info: standard output: Broken pipe'

# --rm removes the input only when the output is safe.
cp a b
run 1 xkv-pack -q --rm -o /nowhere/b.xkv b
run 0 xkv-pack -q --rm b
run 0 xkv-unpack -q --rm b.xkv
same a b
files_are a b big big2.xkv good
finish
