# Terminals: refused as binary output and as input; progress is shown on them.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

in_terminal() { script -qec "$1" /dev/null </dev/null; }
in_terminal true >/dev/null 2>&1 || skip 'script(1) is not there or gets no pseudo-terminal'

make_ggsq >a
run 2 in_terminal 'xkv-pack -c a'
out_has '^xkv-pack: stdout: is a terminal; use -o, or -f to write there all the same'
run 2 in_terminal 'xkv-pack'
out_has '^xkv-pack: stdin: is a terminal; give a file'
files_are a
run 0 in_terminal 'xkv-pack -f -c a 2>/dev/null'

run 0 in_terminal 'xkv-pack --rank-k 9 --rank-v 9 -o out a'
out_has '^.*a  \[#* *\] +[0-9]+ % of 50\.00 KiB'
run 0 in_terminal 'xkv-pack -q -f --rank-k 9 --rank-v 9 -o out a'
out_is ''
run 0 xkv-pack -f --rank-k 9 --rank-v 9 -o out a # standard error is a file
[ "$(wc -l <<<"$err")" -eq 2 ] || fail 'one warning and one result, no progress'
files_are a out
finish
