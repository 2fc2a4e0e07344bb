# Tables, details, JSON.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

make_ggsq layers=5 >a
run 0 xkv-pack -q --group 2 --rank-k 12 --rank-v 12 --rope-base 10000 --rope-style interleaved --head-dim 16 \
    --fingerprint 00112233445566778899aabbccddeeff a
run 0 xkv-pack -q -o b.xkv a

run 0 xkv-info a.xkv b.xkv
is header "$(sed -n 1p <<<"$out" | tr -s ' ')" ' Tokens Layers Groups Raw Packed Ratio ErrK ErrV Codec Engine File'
is rows "$(wc -l <<<"$out")" 3
is 'first row' "$(sed -n 2p <<<"$out" | awk '{print $1, $2, $3, $4, $5, $11, $12, $13, $14}')" \
    '100 5 6 62.50 KiB svd llama.cpp sequence a.xkv'
is 'second row' "$(sed -n 3p <<<"$out" | awk '{print $3, $9, $10, $11, $14}')" '4 0 0 lossless b.xkv'
run 0 xkv-info --verify a.xkv
is header "$(sed -n 1p <<<"$out" | tr -s ' ')" ' Tokens Layers Groups Raw Packed Ratio ErrK ErrV Codec Check Engine File'

run 0 xkv-info -v a.xkv
is 'group rows' "$(grep -c '  svd$' <<<"$out")" 6
is 'last K group' "$(awk '$2 == "K" && $3 == "4" {print $4, $5, $6, $7}' <<<"$out")" '1 6 - 32'
run 0 xkv-info -v b.xkv
is 'group rows' "$(grep -c '  lossless$' <<<"$out")" 4
run 0 xkv-info -vv a.xkv
out_has '^  model\.fingerprint +00112233445566778899aabbccddeeff$'
out_has '^  writer +xkv-pack [0-9.]+$'
out_has '^  positions +0 to 99$'
out_has '^  exact tokens +4 sinks, 0 window$'
out_has '^  rotary embeddings +1$'

run 0 xkv-info --json a.xkv
out_has '^\{"file":"a\.xkv","ok":true,"tokens":100,"layers":5,"raw_bytes":64000,"raw16_bytes":64000,"entry_bytes":'
out_has '"whole_prefix_only":false,'
out_has '"metadata":\{.*"model\.fingerprint":"00112233445566778899aabbccddeeff"'
out_has '"codec":"svd","reason":null,"planes":\[\{"layer":0,"kind":"K","dtype":"f16","error":0\.'
is 'JSON groups' "$(grep -o '{"codec":"svd"' <<<"$out" | wc -l)" 6

# From a stream, and a name that would move the cursor.
run 0 sh -c 'cat a.xkv | xkv-info -'
out_has ' stdin$'
mv a.xkv "$(printf 'a\033[2J.xkv')"
run 0 xkv-info ./*2J.xkv
out_has 'a\\x1b\[2J\.xkv$'
run 0 xkv-info -q b.xkv
out_is ''
finish
