# The pages of xkv-info --report and of python -m xkv.fidelity --report in a headless Chromium: light, dark, narrow and
# printed. The pictures are kept in the build folder, tests/cli/report, to be looked at.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
unset XKV_DICT_PATH
here=$data/../cli
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome) ||
    skip 'needs Chromium: tests/install-packages.sh browser'
command -v python3 >/dev/null || skip 'needs python3'
case $(ldd "$tools/xkv-info") in *lib[at]san*) skip 'the page is the same without sanitizers' ;; esac
shots=$helpers/report
rm -rf "$shots"
mkdir -p "$shots"

browse() { # OPTION...: with the page
    run 0 timeout 100 "$chromium" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
        --user-data-dir="$work/profile" --hide-scrollbars --enable-logging=stderr "$@" "file://$PWD/$page.html"
    if grep -E 'CONSOLE|Content.Security' <<<"$err"; then # messages of the page; others are about the machine
        fail 'the page gives messages'
    fi
}

shot() { # NAME GROUND WIDTH HEIGHT OPTION...
    browse --screenshot="$shots/$page-$1.png" --window-size="$3,$4" "${@:5}"
    run 0 python3 "$here/check_screenshot.py" "$shots/$page-$1.png" "$2"
}

print() { # PAGES FOLDED: on how many at least, and what is folded on the screen
    local pdf=$shots/$page-print.pdf pages
    browse --print-to-pdf="$pdf" --no-pdf-header-footer --blink-settings=preferredColorScheme=0
    pages=$(grep -ac '/Type */Page\b' "$pdf")
    [ "$pages" -ge "$1" ] || fail "printed on $pages pages"
    if command -v pdftotext >/dev/null && command -v pdftoppm >/dev/null; then
        run 0 pdftotext -layout "$pdf" -
        out_has "$2"
        run 0 pdftoppm -r 80 -f 2 -l 3 -png "$pdf" "$shots/$page-print"
        for picture in "$shots/$page"-print-*.png; do # light, also where the screen is dark
            run 0 python3 "$here/check_screenshot.py" "$picture" ffffff
        done
    fi
}

look() { # PAGE PAGES FOLDED
    page=$1
    shot light ffffff 1200 2400
    shot dark 14171c 1200 2400 --blink-settings=preferredColorScheme=0
    shot narrow ffffff 500 2400
    print "$2" "$3"
    # The browser's own reading of the page: no script, and no element that it had to move.
    browse --dump-dom
    grep -qE '<script|<img|<link' <<<"$out" && fail 'elements that do not belong there'
    is tables "$(grep -o '<table>' <<<"$out" | wc -l)" "$(grep -o '<table>' "$page.html" | wc -l)"
    is drawings "$(grep -o '<svg ' <<<"$out" | wc -l)" "$(grep -o '<svg ' "$page.html" | wc -l)"
}

model=(--model "$data/smollm2-135m.gguf")
cp "$data/smollm2-135m-jargon.ggsq" genuine
make_ggsq tokens=300 layers=6 width=32 >c
run 0 xkv-train -q -o d.xkvd c
run 0 xkv-pack -q -D d.xkvd --quality 50 c -o dict.xkv
run 0 xkv-pack -q --ratio 8 "${model[@]}" genuine -o svd.xkv
run 0 xkv-pack -q "${model[@]}" genuine -o lossless.xkv
run 0 xkv-info -D d.xkvd --fidelity "$data/../engine/results/fidelity-2026-11-26.json" --report info.html svd.xkv \
    dict.xkv lossless.xkv d.xkvd

look info 4 'Relative error by layer'

# The Python package's page, drawn by its source as it lies there: that needs nothing compiled.
run 0 python3 "$here/draw_fidelity.py" "$data/../.." fidelity.html
look fidelity 3 'Divergence by method and ratio'
finish
