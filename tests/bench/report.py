"""Tables and charts of rate_distortion.py's rows."""
import csv
import json
import math

import numpy as np

import plot

ERRORS = (0.15, 0.05)  # at which prompt lengths are compared; the first is drawn


# --- Figures ---

def pooled(rows):
    """One row a method and setting that was asked for: ratios and root mean squares over the caches."""
    out = []
    for key in dict.fromkeys(key_of(row) for row in rows):
        same = [row for row in rows if key_of(row) == key]
        row = dict(method=key[0], target=same[0]["target"], setting=same[0]["setting"], caches=len(same),
                   ratio=1 / np.mean([1 / row["ratio"] for row in same]))
        for field in ("error_metric", "error_k", "error_v"):
            row[field] = float(np.sqrt(np.mean([row[field] ** 2 for row in same])))
        out.append(row)
    return out


def key_of(row):
    return row["method"], row["target"] or row["setting"]


def ratio_at(rows, error, field="error_metric_shared"):
    """The ratio at which a method makes this error, between the two nearest of its rows on log scales; None outside."""
    points = sorted((math.log(row[field]), math.log(row["ratio"])) for row in rows if row[field] > 0)
    for (e0, r0), (e1, r1) in zip(points, points[1:]):
        if e0 <= math.log(error) <= e1:
            return math.exp(r0 + (r1 - r0) * (math.log(error) - e0) / max(e1 - e0, 1e-12))
    return None


def by_length(rows, error):
    """{method: [(tokens, ratio)]} at an error."""
    lines = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["target"]):
        for tokens in sorted({row["tokens"] for row in rows}):
            ratio = ratio_at([row for row in rows if (row["method"], row["tokens"]) == (method, tokens)], error)
            if ratio:
                lines.setdefault(method, []).append((tokens, ratio))
    return lines


# --- Charts ---

def distortion_chart(rows, model, caches):
    lines = {}
    for row in pooled(rows):
        if row["error_metric"] > 0:
            lines.setdefault(row["method"], []).append((row["ratio"], row["error_metric"]))
    series = [plot.Series(method, sorted(points), **plot.looks(method)) for method, points in lines.items()]
    points = [point for one in series for point in one.points]
    x_axis = plot.power_axis("raw 16-bit bytes / all bytes stored (a dictionary beside)", [x for x, _ in points],
                             lambda n: f"{n:g}×")
    y_axis = plot.log_axis("relative error in the metric", [y for _, y in points], lambda v: f"{v:g}")
    x_axis.marks = {row["ratio"]: f"lossless, {row['ratio']:.2f}×" for row in pooled(rows)
                    if row["method"] == "lossless"}
    y_axis.marks = {1: "nothing but the mean"} if y_axis.high > 1 else {}
    return plot.chart(f"{model}: error against ratio", f"{caches}. Lower and further right is better; both scales are "
                      "logarithmic", x_axis, y_axis, series)


def length_chart(rows, model, error):
    lines = by_length(rows, error)
    series = [plot.Series(method, points, **plot.looks(method)) for method, points in lines.items()]
    points = [point for one in series for point in one.points]
    return plot.chart(
        f"{model}: ratio by prompt length", f"Where the relative error in the metric is {error:g}, on the same text. "
        "Higher is better", plot.power_axis("tokens of the prompt", [x for x, _ in points], lambda n: f"{n:g}"),
        plot.power_axis("raw 16-bit bytes / all bytes stored", [y for _, y in points], lambda n: f"{n:g}×"), series)


# --- Markdown ---

def markdown(results):
    rows = pooled(results["rows"])
    dictionaries = [f"{method} {info['dictionary_bytes']} bytes from {info['tokens']} tokens"
                    for method, info in results["dictionaries"].items()]
    out = [f"# Bytes against error: {results['model']}", "",
           f"- Measured {results['date']} with {results['code']}; caches {', '.join(results['caches'])}.",
           f"- Dictionaries, beside the ratios: {', '.join(dictionaries)}.",
           "- Methods and figures: `tests/bench/README.md`.", "",
           f"![Error against ratio]({results['model']}.svg)", "",
           "## At the same bytes", "",
           "Relative error in the metric where all bytes stored are at most 1/N of the raw ones.", "",
           *same_bytes(rows), "", "## All settings", "", *all_settings(rows)]
    if results["lengths"]:
        out += ["", *lengths_section(results)]
    return "\n".join(out) + "\n"


def table(header, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def same_bytes(rows):
    targets = sorted({row["target"] for row in rows if row["target"]})
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows if row["target"]):
        found = {row["target"]: f"{row['error_metric']:.4f}" for row in rows if row["method"] == method}
        cells.append([method, *(found.get(target, "") for target in targets)])
    return table(["method", *(f"{target:g}×" for target in targets)], cells)


def all_settings(rows):
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rows = sorted(rows, key=lambda row: (methods.index(row["method"]), row["ratio"]))
    return table(["method", "setting", "ratio", "metric error", "K error", "V error"],
                 [[row["method"], "" if row["target"] else row["setting"], f"{row['ratio']:.2f}",
                   *(f"{row[field]:.4f}" for field in ("error_metric", "error_k", "error_v"))] for row in rows])


def lengths_section(results):
    out = ["## By prompt length", "", f"Ratio at a given error in the metric over the first {results['shared_tokens']} "
           "tokens, which all prompts have in common; the best in bold, - where the sweep ends before the error."]
    if by_length(results["lengths"], ERRORS[0]):
        out += ["", f"![Ratio by prompt length]({results['model']}-lengths.svg)"]
    for error in ERRORS:
        lines = {method: dict(points) for method, points in by_length(results["lengths"], error).items()}
        lengths = sorted({row["tokens"] for row in results["lengths"]})
        best = {n: max((line.get(n, 0) for line in lines.values()), default=0) for n in lengths}
        cells = [[method, *(length_cell(line.get(n), best[n]) for n in lengths)] for method, line in lines.items()]
        out += ["", *table([f"at {error:g}", *(f"{n} tokens" for n in lengths)], cells)]
    return out


def length_cell(ratio, best):
    if ratio is None:
        return "-"
    return f"**{ratio:.1f}**" if ratio == best else f"{ratio:.1f}"


# --- Files ---

COLUMNS = ("part", "cache", "tokens", "method", "setting", "bytes", "ratio", "error_metric", "error_metric_shared",
           "error_k", "error_v", "reported_metric")


def write_csv(path, results):
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        out.writeheader()
        for part in ("rows", "lengths"):
            for row in results[part]:
                out.writerow({"part": part, **{key: figure(value) for key, value in row.items()}})


def write_planes_csv(path, results):
    with open(path, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("cache", "tokens", "method", "setting", "ratio", "layer", "error_k", "error_v"))
        for row in results["rows"]:
            for layer, errors in enumerate(zip(row["planes_k"], row["planes_v"])):
                out.writerow((row["cache"], row["tokens"], row["method"], row["setting"], figure(row["ratio"]), layer,
                              *map(figure, errors)))


def figure(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def rounded(value):
    """For JSON: six digits are more than the figures are good for."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_all(folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    name = results["model"]
    (folder / f"{name}.json").write_text(json.dumps(rounded(results)) + "\n")
    write_csv(folder / f"{name}.csv", results)
    write_planes_csv(folder / f"{name}-planes.csv", results)
    (folder / f"{name}.md").write_text(markdown(results))
    (folder / f"{name}.svg").write_text(distortion_chart(results["rows"], name, ", ".join(results["caches"])))
    if by_length(results["lengths"], ERRORS[0]):
        (folder / f"{name}-lengths.svg").write_text(length_chart(results["lengths"], name, ERRORS[0]))
