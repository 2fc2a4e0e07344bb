# Options, help and usage errors.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

declare -A usages=([xkv-pack]='[options] [FILE...]' [xkv-unpack]='[options] [FILE...]' [xkv-info]='[options] [FILE...]'
    [xkv-train]='[options] -o FILE CACHE...' [xkv-store]='COMMAND [options] STORE [ARGUMENT...]')
out_is_usage() { is 'first line' "$(head -1 <<<"$out")" "Usage: $tool $1"; }

for tool in xkv-pack xkv-unpack xkv-info xkv-train; do
    XKV_BACKEND=cpu run 0 $tool --version
    is 'first line' "$(head -1 <<<"$out" | scrub)" "$tool VERSION"
    out_has '^CPU: [a-z0-9]*, OpenBLAS'
    out_has '^CUDA: not used, XKV_BACKEND=cpu$'
    err_is ''
    XKV_CUDA_PLUGIN=/nowhere/plugin.so run 0 $tool --version
    out_has '^CUDA: not used, no plug-in: /nowhere/plugin.so'
    run 0 $tool -h
    out_is_usage "${usages[$tool]}"
    err_is ''
    run 2 $tool --no-such-option
    out_is ''
    err_is "$tool: unrecognized option '--no-such-option'
Usage: $tool ${usages[$tool]}
Try '$tool --help'."
    run 2 $tool -T
    err_has "^$tool: option requires an argument -- 'T'$"
    run 2 $tool -T 4x file
    err_has "^$tool: --threads: '4x' is not a number from 0 to 1024$"
    run 2 $tool -M -1 file
    err_has "^$tool: --memory: '-1' is not a number of bytes$"
    run 2 $tool -M 99999999999G file
    err_has "^$tool: --memory: '99999999999G' is not a number of bytes$"
    to=() && [ $tool != xkv-train ] || to=(-o none)
    run 1 $tool -q "${to[@]}" missing
    err_is "$tool: missing: cannot open: No such file or directory"
    run 1 $tool "${to[@]}" -M 64MiB -T2 -vv -- -missing
    err_has "^$tool: -missing: cannot open: No such file or directory$"
    run 1 $tool "${to[@]}" .
    err_is "$tool: .: is a folder"
done

# Combinations that make no sense.
usage() { # MESSAGE COMMAND...
    local message=$1
    shift
    run 2 "$@"
    err_is "$1: $message
Usage: $1 ${usages[$1]}
Try '$1 --help'."
}
usage '-o and -c take one input' xkv-pack -c a b
usage '-o and -c take one input' xkv-unpack -o x a b
usage '-c and -o exclude each other' xkv-pack -c -o x a
usage '--json and -c both write to standard output' xkv-pack --json -c a
usage '--json and -c both write to standard output' xkv-unpack --json -o - a
usage '--rm does not go with standard output' xkv-pack --rm -c a
usage '--rank-k and --rank-v go together' xkv-pack --rank-k 3 a
usage 'ranks, --ratio, --error, --energy and --quality exclude each other' xkv-pack --ratio 4 --error 0.1 a
usage 'ranks, --ratio, --error, --energy and --quality exclude each other' xkv-pack --ratio 4 --quality 60 a
usage '-D and --quality go with --profile dict or auto' xkv-pack -D d --profile svd --ratio 3 a
usage '-D and --quality go with --profile dict or auto' xkv-pack --lossless -D d a
usage 'a dictionary goes with --quality, --ratio or --error, not with ranks or --energy' xkv-pack -D d --energy 0.9 a
usage '--profile dict and --quality need a dictionary: -D, or XKV_DICT_PATH' xkv-pack --profile dict a
usage '--profile dict and --quality need a dictionary: -D, or XKV_DICT_PATH' xkv-pack --quality 50 a
usage '--profile scalar needs --ratio or --error' xkv-pack --profile scalar a
usage '--half-factors goes with --profile svd' xkv-pack --profile scalar --ratio 4 --half-factors a
usage '--half-factors goes with --profile svd' xkv-pack -D d --ratio 4 --half-factors a
usage '--profile scalar needs --ratio or --error' xkv-pack --profile scalar --energy 0.9 a
usage 'name the dictionary by -o' xkv-train a
usage 'name caches to train on' xkv-train -o d
usage '--json and -c both write to standard output' xkv-train --json -o - a
usage 'a lossless entry has no rank, ratio, error, energy or quality' xkv-pack --lossless --ratio 4 a
usage '--profile svd needs --rank-k and --rank-v, --ratio, --error or --energy' xkv-pack --profile svd a
usage 'a model without --model needs --rope-base, --rope-style and --head-dim' xkv-pack --rope-base 10000 a
usage '-t writes nothing: it does not go with -o, -c, --rm, --first or --safetensors' xkv-unpack -t -c a

# Values.
usage "--group: '0' is not a number from 1 to 4096" xkv-pack --group 0 a
usage "--ratio: '1' is not a number above 1 and below 1e+06" xkv-pack --ratio 1 a
usage "--error: 'nan' is not a number above 0 and below 1" xkv-pack --error nan a
usage "--profile: 'best' is not one of auto, lossless, svd, dict, scalar" xkv-pack --profile best a
usage "--rope-style: 'neox' is not one of interleaved, half-split" xkv-pack --rope-style neox a
usage "--fingerprint: 'abc' is not 32 hexadecimal digits" xkv-pack --fingerprint abc a
usage "--safetensors: 'rows' is not one of tokens, heads" xkv-unpack --safetensors=rows a
usage "--first: '0' is not a number from 1 to 2147483647" xkv-unpack --first 0 a
usage "--quality: '0' is not a number from 1 to 100" xkv-pack --quality 0 a
usage "--max-quality: 'x' is not a number from 1 to 100" xkv-train --max-quality x -o d a
usage "--group: '0' is not a number from 1 to 4096" xkv-train --group 0 -o d a
usage "level: '20' is not a number from 1 to 19" xkv-pack -20 a
usage 'name a command and a store' xkv-store
usage 'name a command and a store' xkv-store ls
usage "'frob' is not a command" xkv-store frob s
usage 'wrong number of arguments for this command' xkv-store ls s x
usage 'name the output by -o' xkv-store get s x
usage '-o goes with get and export' xkv-store ls -o x s
usage 'get takes either a prompt or --id' xkv-store get -o x s
usage 'rm takes either ids or --all' xkv-store rm --all s 1
usage 'ranks, --ratio, --error, --energy and --quality exclude each other' xkv-store put --ratio 2 --error 0.1 s a
usage '--rank-k and --rank-v go together' xkv-store put --rank-k 3 s a
usage '--profile dict and --quality need a dictionary: -D, or XKV_DICT_PATH' xkv-store put --quality 50 s a
usage "level: '20' is not a number from 1 to 19" xkv-store put -20 s a
usage "--block: '0' is not a number from 1 to 65536" xkv-store init --block 0 s
usage "--ttl: '0' is not a number from 1 to 4294967295" xkv-store put --ttl 0 s a
for command in init put match get ls stat rm pin unpin gc verify repair export import; do
    run 0 grep -q "^.It Cm $command " "$data/../../cli/man/xkv-store.1"
done
files_are ''
finish
