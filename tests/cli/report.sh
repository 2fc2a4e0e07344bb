# The page of xkv-info --report: whole, closed in itself, true, and safe whatever the files hold.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
unset XKV_DICT_PATH
command -v python3 >/dev/null || skip 'needs python3'
here=$data/../cli

page() { # FILE [FACTS]: checks it; its text is in $out
    run 0 python3 "$here/check_report.py" "$@"
}

model=(--model "$data/smollm2-135m.gguf")
for seed in 1 2; do make_ggsq tokens=300 layers=6 width=32 seed=$seed >c$seed; done
make_ggsq tokens=100 seed=3 >plain
cp "$data/smollm2-135m-jargon.ggsq" genuine
run 0 xkv-train -q -o d.xkvd c1 c2
run 0 xkv-pack -q -D d.xkvd --quality 40 c1 -o dict.xkv
run 0 xkv-pack -q --ratio 6 "${model[@]}" genuine -o svdq.xkv
run 0 xkv-pack -q --profile scalar --error 0.1 "${model[@]}" genuine -o scalar.xkv
run 0 xkv-pack -q --rank-k 12 --rank-v 12 plain -o svd.xkv
run 0 xkv-pack -q --window 7 plain -o lossless.xkv

# All profiles and a dictionary, against the JSON.
files=(dict.xkv svdq.xkv scalar.xkv svd.xkv lossless.xkv d.xkvd)
run 0 xkv-info -D d.xkvd --json "${files[@]}"
echo "$out" >facts
run 0 xkv-info -D d.xkvd --report page.html "${files[@]}"
out_is ''
err_is ''
page page.html facts
out_has '^dict, [0-9]+ groups$'
out_has '^step [0-9.]+, which is quality 40\.0$'
out_has '^Smollm2 135M 8k Lc100K Mix1 Ep2$'
out_has '^Group 0: layers 0-3, K and V$'
out_has '^Framing of the engine.s file$'
is 'charts' "$(grep -c '<svg viewBox="0 0 480' page.html)" 22 # 3, 8 and 8 of the entries, 3 of the dictionary
rm page.html

# Without the dictionary the entry is described all the same; with --json there are both.
run 0 xkv-info --json --verify --report page.html svd.xkv lossless.xkv
is lines "$(wc -l <<<"$out")" 2
page page.html
out_has '^everything decoded, all checksums right$'
run 0 xkv-info -f --report page.html dict.xkv
page page.html
out_has 'not at hand: name it by -D'
cp page.html before
mkdir none
run 4 xkv-info -f -D none --report page.html dict.xkv
err_has '^xkv-info: dict.xkv: needs the dictionary [0-9a-f]{32}, which is not in none$'
same page.html before
rmdir none

# The page is there whole or not at all, and never in place of another file unless asked for.
run 1 xkv-info --report page.html svd.xkv
err_is 'xkv-info: page.html: already exists; use -f to overwrite it'
run 2 xkv-info -f --report svd.xkv svd.xkv
err_is 'xkv-info: svd.xkv: is the input as well'
run 1 bash -c 'ulimit -f 4; exec xkv-info -f --report page.html svd.xkv'
run 1 xkv-info -f --report none/page.html svd.xkv
same page.html before
rm page.html before

# Files that fail are on the page; a page of nothing else is not made.
head -c 3000 svd.xkv >cut.xkv
flip_bit cut.xkv 2900
run 3 xkv-info --report page.html cut.xkv
files_are c1 c2 cut.xkv d.xkvd dict.xkv facts genuine lossless.xkv plain scalar.xkv svd.xkv svdq.xkv
run 3 xkv-info --report page.html cut.xkv lossless.xkv
page page.html
out_has '^Files that could not be read$'
out_has '^cut.xkv$'
out_has '^cut.xkv: truncated'

# A damaged chunk is found when its integers are counted.
cp scalar.xkv damaged.xkv
flip_bit damaged.xkv $(($(stat -c %s damaged.xkv) - 60000))
run 3 xkv-info -f --report page.html damaged.xkv
rm page.html

# What can be restored of a model with windows: 6 layers, every other one reaches back 64 tokens.
python3 - >windows.gguf <<'END'
import struct, sys
def string(text):
    return struct.pack("<Q", len(text)) + text.encode()
numbers = {"block_count": 6, "context_length": 4096, "embedding_length": 32, "attention.head_count": 2,
           "attention.head_count_kv": 2, "rope.dimension_count": 16, "attention.key_length": 16, "attention.value_length": 16,
           "attention.sliding_window": 64, "attention.sliding_window_pattern": 2}
fields = [string("general.architecture") + struct.pack("<I", 8) + string("gemma3")]
fields += [string(f"gemma3.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields)
sys.stdout.buffer.write(data + bytes(-len(data) % 32))
END
for window in 50 300; do
    make_ggsq tokens=300 layers=6 width=32 window=$window >windows
    run 0 xkv-pack -q -f --model windows.gguf --error 0.1 windows -o windows.xkv
    run 0 xkv-info --json windows.xkv
    out_has '"model.windows": ?"64 0 64 0 64 0"'
    run 0 xkv-info -f --report page.html windows.xkv
    page page.html
    out_has '^64 tokens, layers 0, 2, 4$'
    if [ "$window" -eq 50 ]; then
        out_has '^whole prefix only: cannot cut .* window does not hold the same tokens \[LS11\]$'
        out_has '^layers 0, 2, 4$'
    else
        out_has '^any number of first tokens$'
        grep -q 'Carried byte for byte' page.html && fail 'layers are carried that are packed'
    fi
done
run 0 xkv-info -f --report page.html svd.xkv
page page.html
out_has '^any number of first tokens$'
grep -q 'Sliding windows' page.html && fail 'windows where there are none'
rm page.html windows windows.gguf windows.xkv

# Names and values that would be markup, turn the text around, or are no text.
name='<script>alert("x&y")</script>'\'
from='Smollm2 135M 8k Lc100K Mix1 Ep2'
is 'length of the name' ${#name} $((${#from} - 1))
sed "s|$from|<script>alert(\"x\&y\")</script>' |" "$data/smollm2-135m.gguf" >hostile.gguf
file=$(printf '<img src=x onerror=alert(1)>&amp;"'\''\033[2J\342\200\256\377.xkv')
run 0 xkv-pack -q --error 0.2 --model hostile.gguf genuine -o "$file"
cp "$file" "bad-$file"
truncate -s 1000 "bad-$file"
run 3 xkv-info --report page.html "$file" "bad-$file"
grep -q '<script\|<img' page.html && fail 'markup from a file'
page page.html
grep -qF '<script>alert("x&y")</script>' <<<"$out" || fail 'the name of the model is not shown'
grep -qF '<img src=x onerror=alert(1)>&amp;"'\''\x1b[2J\u202e\xff.xkv' <<<"$out" || fail 'the name is not shown'

# Standard output, streams, wrong options.
run 0 bash -c 'xkv-info --report - <svd.xkv >out.html'
page out.html
out_has '^stdin$'
run 2 xkv-info -f svd.xkv
err_has '^xkv-info: --fidelity and -f go with --report$'
run 2 xkv-info --fidelity facts svd.xkv
run 2 xkv-info --json --report - svd.xkv
err_has '^xkv-info: --json and --report - both write to standard output$'

# Results of the engine's test.
results=$here/../engine/results
run 0 xkv-info -f --fidelity "$results/fidelity-2026-11-26.json" --report page.html svd.xkv
page page.html
out_has '^Divergence over ratio: smollm2$'
out_has 'over 256 tokens behind a prompt of 1,024\.$'
cp page.html before
echo '{"sweeps": [{"model": 3, "rows": {}, "means": [1, {"method": "a <b> 4x", "ratio": "x"}]}]}' >odd.json
run 3 xkv-info -f --fidelity odd.json --report page.html svd.xkv
err_is 'xkv-info: --fidelity: these are no results of tests/engine'
echo '{' >broken.json
run 3 xkv-info -f --fidelity broken.json --report page.html svd.xkv
run 1 xkv-info -f --fidelity missing.json --report page.html svd.xkv
same page.html before
finish
