# Damaged, foreign and future input: exit code 3, a message that names the file, no output.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

make_ggsq tokens=300 >a
run 0 xkv-pack -q -o lossless.xkv a
run 0 xkv-pack -q --rank-k 12 --rank-v 12 -o svd.xkv a

refused() { # WHY: bad.xkv is refused by every tool
    run 3 xkv-unpack -q -o out bad.xkv
    err_has "^xkv-unpack: bad\.xkv: .*$1"
    run 3 xkv-info --verify bad.xkv
    err_has "^xkv-info: bad\.xkv: .*$1"
    run 3 xkv-unpack -q -t bad.xkv
    run 3 sh -c 'xkv-unpack -q <bad.xkv'
    out_is ''
    rm bad.xkv
    files_are a lossless.xkv svd.xkv
}

for good in lossless.xkv svd.xkv; do
    size=$(stat -c %s $good)
    for at in 0 1 63 64 100 $((size / 2)) $((size - 1)); do
        head -c "$at" $good >bad.xkv
        refused .
    done
    for at in 0 9 16 33 57 64 70 200 1000 $((size / 2)) $((size - 1)); do
        cp $good bad.xkv
        flip_bit bad.xkv "$at"
        refused '\[[A-Z][0-9]+\]'
    done
    (cat $good; printf x) >bad.xkv
    refused '\[H3\]'
done

cp "$data/smollm2-135m.gguf" bad.xkv
refused '\[H1\]'
cp a bad.xkv
refused '\[H1\]'
cp lossless.xkv bad.xkv
reseal bad.xkv 8 2 && reseal bad.xkv 10 2
refused 'version.*\[H4\]'
cp lossless.xkv bad.xkv
reseal bad.xkv 24 2
refused 'feature.*\[H7\]'
cp lossless.xkv bad.xkv
reseal bad.xkv 8 7 # written by a newer version, but readable
run 0 xkv-unpack -q -o out bad.xkv
same a out
rm bad.xkv out

# Engine files that end too soon: in the head, in the first cache, in that of layers with a window.
make_ggsq session=1 >session
make_ggsq tokens=300 window=50 >windows
for file in a session windows; do
    size=$(stat -c %s $file)
    for at in 13 1000 3000 $((size / 2)) $((size - 1)); do
        head -c "$at" $file >short
        run 3 xkv-pack -q short
        err_has '^xkv-pack: short: .*offset'
        rm short
    done
done
rm session windows
make_ggsq session=1 >other # a session of the architecture llama, while the model is another
sed 's/llama/qwen2/' other >session
run 4 xkv-pack -q --model "$data/smollm2-135m.gguf" session
err_has '^xkv-pack: session: .*architecture "qwen2", the model.s is "llama" \[LS12\]'
rm other session

# The first failure gives the exit code.
echo nonsense >bad.xkv
run 3 xkv-info -q bad.xkv missing lossless.xkv
run 1 xkv-info -q missing bad.xkv
rm bad.xkv
files_are a lossless.xkv svd.xkv
finish
