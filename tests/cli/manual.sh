# The manual pages are valid and describe exactly the options of --help; so does the completion.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
here=$data/../../cli

long_options() { grep -oE -- '(^|[ ,])--[a-z][a-z-]+' | tr -d ' ,' | sort -u; }

for tool in xkv-pack xkv-unpack xkv-info xkv-train xkv-store; do
    page=$here/man/$tool.1
    "$tool" --help | long_options >help
    # ".It Fl o , Fl -output Ar file", ".It Fl -rank-k Ar n , Fl -rank-v Ar n"
    grep '^\.It Fl' "$page" | grep -oE 'Fl -[a-z][a-z-]+' | sed 's/Fl -/--/' | sort -u >page_options
    run 0 diff help page_options
    run 0 diff help <(bash -c '. "$1"; _xkv_options "$2"' - "$here/completion/xkv.bash" "$tool")
    if command -v groff >/dev/null; then
        run 0 groff -mdoc -ww -Tutf8 -P-c "$page"
        err_is ''
    fi
done
finish
