# Dictionaries: trained, packed with, found, described, missing, wrong and damaged.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
unset XKV_DICT_PATH

# Figures of floating point may differ between machines, ids with them.
figures() {
    scrub | sed -E 's/[0-9a-f]{32}/ID/g; s/dictionary [0-9a-f]{8},/dictionary ID,/; s/[0-9]+\.[0-9]+(e[-+]?[0-9]+)?/F/g
        s/(step|Step) [0-9]+,/\1 F,/; s/[0-9]+ of ([0-9]+ components)/N of \1/; s/from [0-9]+ stored/from N stored/'
}
err_figures() { is stderr "$(figures <<<"$err")" "$1"; }
out_figures() { is stdout "$(figures <<<"$out")" "$1"; }
id_of() { xkv-info "$1" | awk '$1 == "id" {print $2}'; }

model=--fingerprint=00112233445566778899aabbccddeeff
rotated='as rotated, at a worse ratio; give --model'
for seed in 1 2 3 4; do make_ggsq tokens=200 seed=$seed >c$seed; done

# The report; K as it is, with a warning. 3 caches of 196 rows each.
run 0 xkv-train -o d.xkvd c1 c2 c3
err_figures "xkv-train: warning: K is trained on $rotated
xkv-train: d.xkvd: 588 tokens of 3 caches, 1 groups -> SIZE, T s"
is 'report lines' "$(wc -l <<<"$out")" 12
out_has '^ +50 +[0-9.e-]+ +[0-9]+/256 +[0-9]+\.[0-9]{2} +0\.[0-9]{4}$'
is report "$(sed '2,9d' <<<"$out" | figures)" "dictionary ID
quality 50: expected ratio F, error F on long prompts like those trained on
quality 50: measured ratio F, error F on c3 (200 tokens, trained on)
pays for itself from N stored tokens on"
run 0 xkv-train -f -v --validate c4 --group 2 --apart --max-quality 60 "$model" -T1 -o d2.xkvd c1 c2 c3
out_has 'error [0-9.]+ on c4 \(200 tokens, not trained on\)$'
out_has '^ +3 +64 +[0-9.e+-]+ +[0-9]+ +[0-9]+ +[0-9]+ +[0-9]+$'
out_has '^ +4 +256 +[0-9.e+-]+ ' # the cross stage
is 'qualities' "$(awk '$3 ~ "/256" || $3 ~ "/64" {print $1}' <<<"$out" | tr '\n' ' ')" '30 40 50 60 '
run 0 xkv-train -q -f --json --group 2 --cross 8 -o d2.xkvd "$model" c1 c2 c3
out_has '"groups":2,"cross_components":16,"components":256,"width":128,'
run 2 xkv-train -q -f --cross -1 -o d2.xkvd c1
run 0 xkv-train -q --json -f -o d2.xkvd "$model" c1 c2 c3
out_has '^\{"file":"d2\.xkvd","ok":true,"id":"[0-9a-f]{32}","caches":3,"tokens":588,"groups":1,"cross_components":0,"components":256,"width":256,'
out_has '"validation":\{"file":"c3","trained_on":true,"quality":50,"tokens":200,'
out_has '"qualities":\[\{"quality":30\.0,"step":'
err_is ''
run 0 sh -c 'xkv-train -q -o - c1 c2 c3 >stream.xkvd'
same stream.xkvd d.xkvd
rm stream.xkvd

# Few tokens for the width, and too few.
run 0 xkv-train -o few.xkvd c1
err_has '^xkv-train: warning: 196 training tokens are few for bases 256 wide; from 512 on the figures below hold for other texts$'
make_ggsq tokens=4 >short
run 3 xkv-train -q -o x.xkvd short
err_is 'xkv-train: x.xkvd: the caches hold 0 rows behind their sinks: nothing to train on'
rm few.xkvd

# Inputs that cannot be trained on.
make_ggsq nan=1 tokens=200 >nan
run 3 xkv-train -q -o x.xkvd c1 nan
err_is 'xkv-train: nan: cache 1 holds a NaN or an infinity: a dictionary cannot be trained on it'
make_ggsq layers=5 >other
run 4 xkv-train -q -o x.xkvd c1 other
err_is 'xkv-train: other: has other layers, widths or types than c1'
run 4 xkv-train -q --validate other -o x.xkvd c1
err_is 'xkv-train: other: has other layers, widths or types than c1'
run 3 xkv-train -q -o x.xkvd c1 d.xkvd
err_is 'xkv-train: d.xkvd: holds no cache that is understood'
run 1 xkv-train -q --json -o x.xkvd c1 missing
out_is '{"file":"x.xkvd","ok":false,"exit_code":1,"message":"missing: cannot open: No such file or directory"}'
run 1 xkv-train -q -o d.xkvd c1
err_is 'xkv-train: d.xkvd: already exists; use -f to overwrite it'
run 2 xkv-train -q -f -o c2 c1 c2
err_is 'xkv-train: c2: is the input as well'
run 1 bash -c 'ulimit -f 8; xkv-train -q -o x.xkvd c1 c2'
err_has '^xkv-train: x\.xkvd: .*File too large$'
run 1 xkv-train -q -o /dev/full c1 c2
err_has '^xkv-train: /dev/full: .*No space left on device'
run 6 xkv-train -q -M 100K -o x.xkvd c1 c2
err_has '^xkv-train: x\.xkvd: .*limit'
run 3 xkv-train -q --metric c1 -o x.xkvd c1
err_is 'xkv-train: c1: not a file of the expected kind: not a safetensors file [SF1]'
rm -f short nan
files_are c1 c2 c3 c4 d.xkvd d2.xkvd other

# Described.
run 0 xkv-info --verify d2.xkvd
out_figures "d2.xkvd: dictionary, OK
  id                       ID
  model.fingerprint        ID
  layers                   4
  groups                   1
  cross components         0
  components               256
  training tokens          588
  unit                     F
  max quality              85
  bytes                    $(stat -c %s d2.xkvd) (SIZE)"
out_has '^  model.fingerprint +00112233445566778899aabbccddeeff$'
run 0 xkv-info d.xkvd
out_has '^  model.fingerprint +unknown$'
run 0 xkv-info --json d.xkvd
out_has "^\{\"file\":\"d\.xkvd\",\"ok\":true,\"kind\":\"dictionary\",\"id\":\"$(id_of d.xkvd)\""

# Packed with, and restored.
run 0 xkv-pack -D d.xkvd -o e.xkv c4
err_figures "xkv-pack: c4: warning: K is coded $rotated
xkv-pack: c4: SIZE -> SIZE (Rx), step F, metric error F, N of 256 components, dictionary ID, error K F V F, T s"
run 0 xkv-pack -v -f -D d.xkvd --quality 60 -o e.xkv c4
err_has "^xkv-pack: c4: dictionary $(id_of d.xkvd), [0-9.]+ KiB, 1 groups, 256 components$"
run 0 xkv-pack -q -f --json -D d.xkvd --error 0.05 -o e.xkv c4
out_has "\"step\":[0-9.e-]+,\"error_metric\":0\.0[0-9]+,\"components\":[0-9]+,\"component_total\":256,\"dictionary_id\":\"$(id_of d.xkvd)\",\"dictionary_bytes\":$(stat -c %s d.xkvd)\}$"
run 0 xkv-pack -f -D d.xkvd --quality 90 -o f.xkv c4
err_has '^xkv-pack: c4: warning: the dictionary was trained for qualities up to 85; 90 costs more than it gives$'
head -c 1000 d.xkvd >foreign # a file without planes travels as it is
run 0 xkv-pack -q -f -D d.xkvd --quality 50 -o f.xkv foreign
run 0 xkv-unpack -q -o r f.xkv
same r foreign
rm r f.xkv foreign
run 0 xkv-unpack -D d.xkvd -o r e.xkv
err_is 'xkv-unpack: e.xkv: SIZE -> SIZE, lossy, T s'
is 'restored size' "$(stat -c %s r)" "$(stat -c %s c4)"
run 0 xkv-unpack -q -t -D . e.xkv
run 0 xkv-unpack -q -f --first 10 --safetensors -D . -o r e.xkv
rm r

# Listed without the dictionary; verified with it only.
run 0 xkv-info -v e.xkv
is row "$(sed -n 2p <<<"$out" | awk '{print $1, $2, $3, $11, $14}')" '200 4 1 dict e.xkv'
out_has '^ +0 mixed +0-3 +8 +[0-9]+/256 +[0-9.e-]+ +256 .* dict$'
run 0 xkv-info --json e.xkv
out_has "\"codec\":\"dict\",\"dictionary_id\":\"$(id_of d.xkvd)\""
out_has '"step":[0-9.e-]+,"coded":[0-9]+\}\]\}$'
run 0 xkv-info --verify -q -D d.xkvd e.xkv
missing="e.xkv: needs the dictionary $(id_of d.xkvd)"
run 4 xkv-info --verify e.xkv
err_is "xkv-info: $missing; name it, or its folder, by -D"
run 4 xkv-unpack -q e.xkv -o r
err_is "xkv-unpack: $missing; name it, or its folder, by -D"
wrong="e.xkv: model or geometry mismatch: the entry needs the dictionary $(id_of d.xkvd), this one is $(id_of d2.xkvd) [Q5]"
run 4 xkv-unpack -q -D d2.xkvd e.xkv -o r
err_is "xkv-unpack: $wrong"
run 4 xkv-info --verify -D d2.xkvd e.xkv
err_is "xkv-info: $wrong"
mkdir dicts
cp d2.xkvd dicts
run 4 xkv-unpack -q -D dicts e.xkv -o r
err_is "xkv-unpack: $missing, which is not in dicts"
run 1 xkv-unpack -q -D nowhere e.xkv -o r
err_is 'xkv-unpack: nowhere: cannot open: No such file or directory'
run 3 xkv-unpack -q -D e.xkv e.xkv -o r
err_has '^xkv-unpack: e\.xkv: .*kind is 1 .*\[H6\]$'
run 3 xkv-unpack -q d.xkvd -o r
err_has '^xkv-unpack: d\.xkvd: .*kind is 2 .*\[H6\]$'

# By the environment, which never makes lossless lossy.
cp d.xkvd dicts/b.xkvd
export XKV_DICT_PATH=dicts
run 0 xkv-unpack -q -o r e.xkv
run 0 xkv-info --verify -q e.xkv
run 0 xkv-pack -q -f -o f.xkv c4
run 0 xkv-info f.xkv
out_has ' lossless +llama'
run 0 xkv-pack -f "$model" --quality 50 -o f.xkv c4 # by the model
err_has "dictionary $(id_of d2.xkvd | cut -c1-8), "
run 4 xkv-pack -q -f --quality 50 -o f.xkv c4
err_is 'xkv-pack: c4: 2 dictionaries in dicts fit; name one by -D'
run 4 xkv-pack -q --quality 50 -o g.xkv other
err_is 'xkv-pack: other: no dictionary in dicts fits the model'
run 0 xkv-pack -q -f --ratio 1.5 -o f.xkv other # another profile will do
run 4 xkv-pack -q -D d.xkvd -o g.xkv other
err_is 'xkv-pack: other: has 5 layers, the dictionary d.xkvd 4'
run 0 xkv-pack -f -D d2.xkvd --fingerprint ffffffffffffffffffffffffffffffff -o f.xkv c4
err_has '^xkv-pack: c4: warning: the dictionary d2\.xkvd was trained on the model 00112233445566778899aabbccddeeff$'
run 0 xkv-pack -q -f --profile scalar --ratio 3 -o f.xkv c4
run 0 xkv-info -v f.xkv
out_has ' mixed +0-3 +8 +[0-9]+/256 +[0-9.e-]+ +256 .* scalar$'
unset XKV_DICT_PATH
rm -f f.xkv r

# A store packs with the same model as xkv-pack: that of --fingerprint alone.
run 0 xkv-store init st
run 0 xkv-store put -D d2.xkvd --quality 50 --fingerprint ffffffffffffffffffffffffffffffff st c4
err_has '^xkv-store: c4: warning: the dictionary d2\.xkvd was trained on the model 00112233445566778899aabbccddeeff$'
run 0 grep -q model.fingerprint st/blobs/*.0000000000000002
rm -r st

# Damaged: named, and skipped in a folder.
size=$(stat -c %s d.xkvd)
for at in 0 63 200 $((size / 2)) $((size - 1)); do
    head -c "$at" d.xkvd >bad.xkvd
    run 3 xkv-info bad.xkvd
    run 3 xkv-pack -q -D bad.xkvd -o f.xkv c4
    err_has '^xkv-pack: bad\.xkvd: .'
    run 3 xkv-unpack -q -D bad.xkvd -o r e.xkv
    err_has '^xkv-unpack: bad\.xkvd: .'
done
for at in 30 70 300 $((size / 3)) $((size / 2)) $((size - 1)); do
    cp d.xkvd bad.xkvd
    flip_bit bad.xkvd "$at"
    run 3 xkv-info --verify bad.xkvd
    err_has '^xkv-info: bad\.xkvd: .*\[[A-Z][0-9]+\]'
done
head -c 200 d.xkvd >bad.xkvd
run 0 xkv-unpack -t -v -D . e.xkv
err_has '^xkv-unpack: \./bad\.xkvd: skipped: .'
rm bad.xkvd
files_are c1 c2 c3 c4 d.xkvd d2.xkvd dicts dicts/b.xkvd dicts/d2.xkvd e.xkv other

# A genuine cache, by its model: 156 rows for bases of 1536 elements.
sample=$data/smollm2-135m-jargon.ggsq gguf=$data/smollm2-135m.gguf
run 0 xkv-train --model "$gguf" -o dicts/genuine.xkvd "$sample"
err_is "xkv-train: dicts/genuine.xkvd: 156 tokens of 1 cache, 8 groups, cross stage of 1536 components -> SIZE, T s
xkv-train: warning: 156 training tokens are few for bases 1536 wide; from 3072 on the figures below hold for other texts"
run 0 xkv-pack -D dicts --model "$gguf" --ratio 16 -o g.xkv "$sample"
err_has ', step [0-9.]+, metric error 0\.[0-9]+, [0-9]+ of 11520 components, dictionary [0-9a-f]{8}, error K 0\.[0-9]+ V '
run 0 xkv-pack -f -vv -D dicts --model "$gguf" --ratio 16 -o g.xkv "$sample"
err_has ': dictionary [0-9a-f]{32}, .*, 8 groups, 11520 components$'
err_has ': 160 tokens, 30 layers, 8 groups \(0 lossless\), '
run 0 xkv-info --verify -D dicts g.xkv
out_has ' 1[56]\.[0-9]+ +0\.[0-9]+ +0\.[0-9]+ dict +OK '
run 0 xkv-unpack -q -D dicts --model "$gguf" -o r g.xkv
run 0 xkv-pack -f -D dicts/genuine.xkvd -o g.xkv "$sample"
err_has 'warning: the dictionary has no basis for these planes \(without --model\); they are stored losslessly$'
finish
