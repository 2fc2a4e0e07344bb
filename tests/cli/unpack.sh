# Prefixes, safetensors, models.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

# The first N tokens are the file that the engine would have written for them.
for kind in version=3 version=4 vtrans=1 dtype=f32 session=1 window=100; do
    make_ggsq $kind tokens=100 >all
    run 0 xkv-pack -q all
    for n in 1 32 99 100; do
        make_ggsq $kind tokens=$n >expected
        run 0 xkv-unpack -q -f --first $n -o prefix all.xkv
        same expected prefix
    done
    run 2 xkv-unpack -q -f --first 101 -o prefix all.xkv
    err_has '^xkv-unpack: all\.xkv: .*101'
    rm all.xkv
done
rm -f prefix expected

# Layers with a window that hold fewer tokens: the whole file, but no prefix of it.
make_ggsq window=40 >a
run 0 xkv-pack a
err_has '^xkv-pack: a: .* layers with a window .* only the whole prefix can be restored$'
run 0 xkv-unpack -q -o back a.xkv
same a back
run 1 xkv-unpack -q -f --first 50 -o back a.xkv
err_has '^xkv-unpack: a\.xkv: not supported: cannot cut this llama\.cpp sequence, only restore its whole prefix: '
run 0 xkv-info -v a.xkv
out_has '^  whole prefix only: cannot cut this llama\.cpp sequence, .* its layers with a window '
run 0 xkv-info --json a.xkv
out_has '"whole_prefix_only":true,'
rm a a.xkv back

# safetensors and back, in both layouts.
make_ggsq >a
run 0 xkv-pack -q a
for layout in '' =tokens =heads; do
    run 0 xkv-unpack -q -f "--safetensors$layout" a.xkv
    run 0 xkv-pack -q -f a.safetensors
    run 0 xkv-unpack -q -f -o back a.safetensors.xkv
    same a.safetensors back
    run 0 xkv-info a.safetensors.xkv
    out_has '^ +100 +4 '
done
run 0 xkv-unpack -q -f --safetensors --first 10 -o ten.safetensors a.xkv
run 0 xkv-pack -q ten.safetensors
run 0 xkv-info ten.safetensors.xkv
out_has '^ +10 +4 '

# Quantized blocks: the same file, a prefix of it, and f32 as safetensors, which have no such types.
blocks=$data/../golden/lossless-blocks.ggsq
run 0 xkv-pack -q -o blocks.xkv "$blocks"
run 0 xkv-unpack -q -f -o back blocks.xkv
same "$blocks" back
run 0 xkv-info -vv blocks.xkv
out_has '^ +element types +q8_0, q4_0$'
run 0 xkv-unpack -q -f --first 7 -o back blocks.xkv
run 0 xkv-pack -q -f -o prefix.xkv back
run 0 xkv-info -vv prefix.xkv
out_has '^ +7 +2 '
out_has '^ +element types +q8_0, q4_0$'
run 0 xkv-unpack -q -f --safetensors=heads blocks.xkv -o blocks.safetensors
run 0 xkv-pack -q -f blocks.safetensors
run 0 xkv-info -vv blocks.safetensors.xkv
out_has '^ +40 +2 '
out_has '^ +element types +f32$'
rm blocks.* prefix.xkv

# Other models are refused.
model=$data/smollm2-135m.gguf
cp "$data/smollm2-135m-jargon.ggsq" genuine
run 0 xkv-pack -q --model "$model" genuine
run 0 xkv-unpack -q -f --model "$model" genuine.xkv
same genuine "$data/smollm2-135m-jargon.ggsq"
other=00112233445566778899aabbccddeeff
run 4 xkv-unpack -q --fingerprint $other -o x genuine.xkv
err_has "^xkv-unpack: genuine\.xkv: .*$other"
run 4 xkv-unpack -q --model "$model" -o x a.xkv
err_has '^xkv-unpack: a\.xkv: '
run 0 xkv-unpack --any-model --fingerprint $other -o x genuine.xkv
err_has '^xkv-unpack: genuine\.xkv: warning: '
run 4 xkv-pack -q --model "$model" -o y a
err_has '^xkv-pack: a: '
run 0 xkv-pack -q --fingerprint $other -o y a
run 0 xkv-unpack -q --fingerprint ${other^^} -o z y
same a z
run 1 xkv-unpack -q --model missing.gguf -o z2 y
err_has '^xkv-unpack: missing\.gguf: .*No such file'
files_are a a.safetensors a.safetensors.xkv a.xkv all back genuine genuine.xkv ten.safetensors ten.safetensors.xkv x y z
finish
