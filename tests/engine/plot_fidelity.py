"""plot_fidelity.py JSON... - charts of KL over ratio from results of fidelity.py: an SVG a model, beside each file."""
import json
import pathlib
import re
import sys

import plot

FLOOR = "one ulp off"


def chart(sweep):
    """Of the means over the prompts, where there are several."""
    rows = sweep["means"] or sweep["rows"]
    tokens = rows[0]["tokens"]
    lines = {}
    for row in rows:
        method = re.sub(r" [0-9.]+x$", "", row["method"])
        if row["tokens"] == tokens and method != FLOOR:
            lines.setdefault(method, []).append((row["ratio"], row["kl"]))
    series = [plot.Series(method, sorted(points), **plot.looks(method)) for method, points in lines.items()]
    points = [point for one in series for point in one.points]
    prompts = len({row["prompt"] for row in sweep["rows"] if row["tokens"] == tokens})
    subtitle = (f"{prompts} prompt{'s' * (prompts > 1)} of {tokens} tokens, judged by the engine over the next "
                f"{sweep['following']}. Lower and further right is better")
    return plot.chart(
        f"{sweep['model']}: divergence against ratio", subtitle,
        plot.power_axis("raw 16-bit bytes / all bytes stored (a dictionary beside)", [x for x, _ in points],
                        lambda n: f"{n:g}×"),
        plot.log_axis("KL of the next-token distributions (nats)", [y for _, y in points], lambda v: f"{v:g}",
                      (1, 3)), series)


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in map(pathlib.Path, sys.argv[1:]):
        results = json.loads(path.read_text())
        for sweep in results.get("sweeps", [results]):
            out = path.with_name(f"{path.stem}-{sweep['model']}.svg")
            out.write_text(chart(sweep))
            print(out)


if __name__ == "__main__":
    main()
