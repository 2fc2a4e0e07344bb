# Packing and restoring files of every kind; results, warnings and targets.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

# Lossless is identical, for all versions, types and layouts.
for kind in version=2 version=3 version=4 dtype=bf16 dtype=f32 vtrans=1 shuffle=1 tokens=0 tokens=1 tokens=300 session=1 window=40 window=200 \
    'layers=5 width=48 vtrans=1 shuffle=1 tokens=257'; do
    # shellcheck disable=SC2086 # several words
    make_ggsq $kind >a
    run 0 xkv-pack -q a
    out_is ''
    err_is ''
    run 0 xkv-unpack -q -o b a.xkv
    same a b
    run 0 xkv-info --verify -q a.xkv
    rm -f a.xkv b
done

make_ggsq >a.ggsq
run 0 xkv-pack a.ggsq
out_is ''
err_is 'xkv-pack: a.ggsq: SIZE -> SIZE (Rx), lossless, T s'
run 0 xkv-unpack -o b.ggsq a.ggsq.xkv
err_is 'xkv-unpack: a.ggsq.xkv: SIZE -> SIZE, lossless, T s'
same a.ggsq b.ggsq

# Levels: the last one counts.
run 0 xkv-pack -q -f -19 a.ggsq
run 0 xkv-pack -q -f -1 -9 a.ggsq
run 0 xkv-unpack -t a.ggsq.xkv
err_is 'xkv-unpack: a.ggsq.xkv: OK, SIZE, T s'

# svd without a model: K as it is, with a warning.
run 0 xkv-pack -f --rank-k 12 --rank-v 12 a.ggsq
err_has '^xkv-pack: a.ggsq: warning: K is coded as rotated, at a worse ratio; give --model$'
err_has '^xkv-pack: a.ggsq: .* -> .*, error K 0\.[0-9]{4} V 0\.[0-9]{4}, [0-9.]+ s$'
run 0 xkv-info --verify -q a.ggsq.xkv

# The model by options, and by a GGUF file.
run 0 xkv-pack -f --energy 0.999 --rope-base 10000 --rope-style half-split --head-dim 16 a.ggsq
err_has '^xkv-pack: a.ggsq: .*error K'
[ "$(wc -l <<<"$err")" -eq 1 ] || fail 'no warning is due'
cp "$data/smollm2-135m-jargon.ggsq" genuine
run 0 xkv-pack --ratio 3 --model "$data/smollm2-135m.gguf" --json -q genuine
out_has '^\{"file":"genuine","ok":true,"output":"genuine\.xkv","tokens":160,"raw_bytes":3686400,"raw16_bytes":3686400,'
out_has '"ratio":(2\.9[1-9]|3\.0)[0-9]*,"error":\{"K":0\.[0-9]+,"V":0\.[0-9]+\},"groups":8,"lossless_groups":0,'
out_has '"profile":"(svd|scalar)","estimates":\{"svd":\{"bytes":12[0-9]{5},"error":0\.[0-9]+\},"scalar":\{"bytes":12[0-9]{5},"error":0\.[0-9]+\}\}'
run 0 xkv-info --verify genuine.xkv
out_has ' OK +llama.cpp sequence +genuine.xkv$'

# Every group of 16-bit factors within the asked error.
run 0 xkv-pack -q -f --half-factors --error 0.1 --model "$data/smollm2-135m.gguf" genuine
run 0 xkv-info -v genuine.xkv
is 'groups above the asked error' "$(awk '$NF == "svd" && $(NF - 1) > 0.1' <<<"$out")" ''
is 'svd groups' "$(grep -c 'svd$' <<<"$out")" 8

# Auto: says what it chose, and among what. Coarse errors suit svd, fine ones scalar.
run 0 xkv-pack -f --error 0.2 --model "$data/smollm2-135m.gguf" genuine
err_has '^xkv-pack: genuine: profile svd is the best by a sample: svd [0-9.]+ KiB, scalar [0-9.]+ KiB$'
err_has '^xkv-pack: genuine: .*, step 0\.[0-9]+, error 0\.(19[0-9]+|2000), [0-9]+ of 11520 components, error K'
run 0 xkv-info -v genuine.xkv
is 'svdq groups' "$(grep -c 'svdq$' <<<"$out")" 8
out_has '^ +0 mixed +0-3 +8 +([0-9]+)/\1 +0\.[0-9]+ +1536 .* svdq$'
run 0 xkv-info --verify -q genuine.xkv
run 0 xkv-pack -f --error 0.005 --model "$data/smollm2-135m.gguf" genuine
err_has '^xkv-pack: genuine: profile scalar is the best by a sample: lossless 3[0-9.]+ MiB, svd [0-9.]+ MiB, scalar [0-9.]+ MiB$'
run 0 xkv-pack -f --ratio 6 --model "$data/smollm2-135m.gguf" genuine
err_has '^xkv-pack: genuine: profile svd is the best by a sample: svd error 0\.[0-9]+, scalar error 0\.[0-9]+$'
run 0 xkv-pack -f --profile scalar --ratio 6 --model "$data/smollm2-135m.gguf" genuine
is 'lines about one profile' "$(grep -c . <<<"$err")" 1

# Out of reach; too little memory; both leave nothing behind.
rm -f genuine.xkv
run 5 xkv-pack -q --ratio 100000 genuine
err_has '^xkv-pack: genuine: .*ratio'
run 6 xkv-pack -q -M 100K genuine
err_has '^xkv-pack: genuine: .*limit'
rm -f a b a.ggsq.xkv b.ggsq
files_are a.ggsq genuine

# NaN and Inf: those planes exact, and said so.
make_ggsq layers=8 nan=1 inf=6 >odd
run 0 xkv-pack --rank-k 12 --rank-v 12 odd
err_has '^xkv-pack: odd: warning: 2 planes hold NaN or Inf and are stored losslessly$'
run 0 xkv-unpack -q -o odd2 odd.xkv
run 0 xkv-info -v odd.xkv
out_has 'lossless \(NaN or Inf\)$'

# A foreign file travels as it is.
head -c 10000 "$data/smollm2-135m.gguf" >foreign
run 0 xkv-pack foreign
err_has '^xkv-pack: foreign: warning: not a known engine file; stored byte for byte$'
run 0 xkv-unpack -q -o foreign2 foreign.xkv
same foreign foreign2

# Several files: one failure does not stop the others.
run 1 xkv-pack -q -f a.ggsq missing odd
err_is 'xkv-pack: missing: cannot open: No such file or directory'
run 0 xkv-info -q a.ggsq.xkv odd.xkv
run 1 xkv-pack -q --json missing
out_is '{"file":"missing","ok":false,"exit_code":1,"message":"missing: cannot open: No such file or directory"}'
finish

# Appending: the first tokens stay as they are packed; the whole file comes back.
rm -f genuine.xkv
cp "$data/smollm2-135m-jargon.ggsq" genuine
run 0 xkv-pack -q genuine
run 0 xkv-unpack -q --first 100 -o head genuine.xkv
run 0 xkv-pack -q head
run 0 xkv-pack -f --append head.xkv genuine
err_is 'xkv-pack: genuine: SIZE -> SIZE (Rx), lossless, T s'
run 0 xkv-unpack -q -f -o back genuine.xkv
same genuine back
run 0 xkv-pack -q -f --model "$data/smollm2-135m.gguf" --profile scalar --error 0.1 head
run 0 xkv-pack -f --model "$data/smollm2-135m.gguf" --append head.xkv genuine
err_has '^xkv-pack: genuine: .*, step 0\.[0-9]+, [0-9]+ of 11520 components, error K 0\.0'
run 0 xkv-info --verify genuine.xkv
run 4 xkv-pack -f --append head.xkv genuine
err_is 'xkv-pack: genuine: the cache has other planes, RoPE, positions or token ids than the entry to append to'
run 2 xkv-pack --append head.xkv genuine head
err_has '^xkv-pack: --append takes one FILE$'
run 2 xkv-pack --append head.xkv --error 0.1 genuine
err_has '^xkv-pack: --append goes on with the codec of the entry: '
run 1 xkv-pack -f --append missing.xkv genuine
err_has '^xkv-pack: missing.xkv: '
