# bash completion for xkv-pack, xkv-unpack, xkv-info, xkv-train and xkv-store. The options come from --help, so that there is one list.

_xkv_options() {
    "$1" --help 2>/dev/null | grep -oE '(^|[ ,])--[a-z][a-z0-9-]*' | tr -d ' ,' | sort -u
}

_xkv_files() { # all files, or those that end in $2
    local IFS=$'\n'
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -d -- "$1"; compgen -f ${2:+-X "!*$2"} -- "$1")
}

_xkv() {
    local tool=$1 current=$2 previous=$3
    COMPREPLY=()
    case $previous in
    --profile) mapfile -t COMPREPLY < <(compgen -W 'auto lossless svd dict scalar' -- "$current"); return ;;
    --rope-style) mapfile -t COMPREPLY < <(compgen -W 'interleaved half-split' -- "$current"); return ;;
    --model) _xkv_files "$current" .gguf; return ;;
    --metric) _xkv_files "$current" .safetensors; return ;;
    -D | --dictionary) _xkv_files "$current" .xkvd; return ;;
    --append) _xkv_files "$current" .xkv; return ;;
    --report) _xkv_files "$current" .html; return ;;
    --fidelity) _xkv_files "$current" .json; return ;;
    -o | --output | --validate | --salt-file | --key-file) _xkv_files "$current"; return ;;
    -T | -M | --threads | --memory | --fingerprint | --group | --cross | --rank-[kv] | --ratio | --error | --energy | --sinks | \
        --window | --iterations | --quality | --max-quality | --rope-base | --rope-dim | --rope-scale | --head-dim | --first | --settings | \
        --lora | --block | --cap | --ttl | --min | --id | --remote | --wait) return ;;
    esac
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$(_xkv_options "$tool")" -- "$current")
    elif [[ ${tool##*/} == xkv-store && $COMP_CWORD -eq 1 ]]; then
        mapfile -t COMPREPLY < <(compgen -W 'init put match get ls stat rm pin unpin gc verify repair export import push' -- "$current")
    elif [[ ${tool##*/} == xkv-store || ${tool##*/} == xkv-pack || ${tool##*/} == xkv-train ]]; then
        _xkv_files "$current"
    else
        _xkv_files "$current" .xkv
        if [[ ${tool##*/} == xkv-info ]]; then
            mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -X '!*.xkvd' -- "$current")
        fi
    fi
}

complete -F _xkv xkv-pack xkv-unpack xkv-info xkv-train xkv-store
