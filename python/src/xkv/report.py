"""The page of python -m xkv.fidelity --report: divergence over ratio, restore against prefill, bytes by part, error by layer.

Results are documents of JSON: those of this package and of tests/engine (one model, or "sweeps" of several), measurements of
speed ("speeds", by tests/engine), and those of xkv_bench --restore. Figures that a document does not have are left out."""
from __future__ import annotations

import json
import math
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from . import _svg
from ._svg import Axis, Chart, number

Row = Dict[str, Any]
Points = List[Tuple[float, float]]

WIDTH, LEFT, RIGHT, TOP, FOOT = 960, 72, 850, 26, 380
FLOOR = "one ulp off"  # two caches that differ in the last bit: what the measurement cannot tell apart
PARTS = ("Coefficients", "Coefficients of the cross stage", "Lossless groups", "Exact rows: sinks and window",
         "Side parts: steps, tables, components", "Framing of the engine's file", "Token ids",
         "Header, tables, metadata, alignment")
TIMES = {"prefill_seconds": "prefill by the engine", "restore_seconds": "restore",
         "raw_seconds": "reading the raw cache", "cold_seconds": "reading the raw cache, from disk"}


class NotResults(ValueError):
    """A file that holds nothing to draw."""


@dataclass
class Results:
    """What is known of one model."""

    name: str
    facts: Row = field(default_factory=dict)
    rows: List[Row] = field(default_factory=list)    # means over prompts where there are any
    single: List[Row] = field(default_factory=list)  # one for each prompt
    speeds: List[Row] = field(default_factory=list)

    def methods(self) -> Dict[str, List[Row]]:
        """Rows of prompts of the first length, by method and in order of their ratios."""
        rows = [row for row in self.rows if row.get("tokens") == self.rows[0].get("tokens")]
        names = dict.fromkeys(method_of(row) for row in rows)
        return {name: sorted((row for row in rows if method_of(row) == name), key=lambda row: float(row["ratio"]))
                for name in names}


def method_of(row: Row) -> str:
    """"dict" of "dict 16x"."""
    return re.sub(r" [0-9.]+x$", "", str(row["method"]))


# --- Reading ---

def read(paths: Sequence[pathlib.Path]) -> List[Results]:
    """Documents of one model become one. NotResults: a file has none."""
    found: Dict[str, Results] = {}
    for path in paths:
        before = len(found), sum(len(one.rows) + len(one.speeds) for one in found.values())
        try:
            for document in _documents(json.loads(path.read_text())):
                _add(found, document)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotResults(f"{path}: these are no results: {error}") from error
        if before == (len(found), sum(len(one.rows) + len(one.speeds) for one in found.values())):
            raise NotResults(f"{path}: there are no results in it")
    return list(found.values())


def _documents(data: Any) -> Iterator[Row]:
    if isinstance(data, list):
        for part in data:
            yield from _documents(part)
    elif "sweeps" in data:
        for sweep in data["sweeps"]:
            yield {"machine": data.get("machine"), "date": data.get("date"), **sweep}
    elif "documents" in data:
        for part in data["documents"]:
            yield from _documents(part)
    elif "files" in data:
        for file in data["files"]:
            size = file["lengths"][0]["raw_bytes"] // file["lengths"][0]["tokens"]
            yield dict(model=f"{file['cache']}, {size:,} bytes a token", machine=data["machine"]["cpu"],
                       speeds=[_bench(row) for row in file["lengths"]])
    else:
        yield data


def _bench(length: Row) -> Row:
    row = dict(tokens=length["tokens"], ratio=length["raw_bytes"] / length["packed_bytes"],
               raw_seconds=length["read_raw_seconds"], cold_seconds=length["read_raw_cold_seconds"])
    for run in length["restore"]:
        row[f"restore_{run['threads']}_seconds"] = run["seconds"]
    return row


def _add(found: Dict[str, Results], document: Row) -> None:
    rows = [row for row in document.get("rows", []) if _is_row(row)]
    means = [row for row in document.get("means", []) if _is_row(row)]
    speeds = [row for row in document.get("speeds", []) if float(row["tokens"]) > 0]
    if not rows and not speeds:
        return
    results = found.setdefault(str(document["model"]), Results(str(document["model"])))
    results.facts.update({key: value for key, value in document.items() if isinstance(value, (str, int, float))})
    results.single += rows
    results.rows += means or rows
    results.speeds += speeds


def _is_row(row: Row) -> bool:
    """Of numbers that can be drawn; a divergence below zero is one of rounding."""
    values = [float(row["ratio"]), float(row["kl"]), float(row["kl_p99"]), float(row["top1"])]
    return all(map(math.isfinite, values)) and 0 < values[0] < 1e6 and isinstance(row["method"], str)


# --- Divergence ---

def _ratio_axis(methods: Dict[str, List[Row]], length: float = RIGHT - LEFT) -> Axis:
    return Axis.linear(0, max(float(row["ratio"]) for rows in methods.values() for row in rows), LEFT, length)


def _curves(chart: Chart, methods: Dict[str, List[Row]], key: str, what: str, labels: bool) -> None:
    for index, (name, rows) in enumerate(methods.items()):
        points = [(float(row["ratio"]), float(row[key])) for row in rows if float(row[key]) > 0 or not chart.y.log]
        if points:
            chart.curve(index, points, name, what)
            if labels:
                chart.mark(*points[-1], name)


def _over_ratio(title: str, methods: Dict[str, List[Row]], key: str, what: str, labels: bool, height: float) -> str:
    values = [float(row[key]) for rows in methods.values() for row in rows]
    drawn = [value for value in values if value > 0]
    y = (Axis.linear(min(drawn, default=0.0), 1.0, height, TOP - height) if key == "top1" else
         Axis.logarithmic(min(drawn, default=1e-6), max(drawn, default=1.0), height, TOP - height))
    width = WIDTH if labels else 480
    x = _ratio_axis(methods, (RIGHT if labels else 460) - LEFT)
    chart = Chart(title, "The table below has the same numbers.", x, y, width, height + 44)
    chart.axes("ratio: raw 16-bit bytes / all bytes", what)
    _curves(chart, methods, key, what, labels)
    return chart.svg()


def _divergence(results: Results) -> str:
    methods = results.methods()
    floor = methods.pop(FLOOR, [])
    if not methods:
        return ""
    prompts = len({row.get("prompt") for row in results.single})
    text = (f"{'Means over ' + str(prompts) + ' prompts of' if prompts > 1 else 'Of'} next-token distributions with the restored "
            f"cache from those with the raw one, over {number(results.facts.get('following'))} tokens behind a prompt of "
            f"{number(results.rows[0].get('tokens'))}: further right and further down is better.")
    if floor:
        text += f" Two caches that differ in the last bit only are {number(float(floor[0]['kl']))} apart."
    legend = _svg.keys([(f"k{i % _svg.COLOURS}", name) for i, name in enumerate(methods)], line=True)
    charts = _over_ratio("Divergence over ratio", methods, "kl", "KL, nats", True, FOOT) + _svg.panels([
        ("The worst hundredth of positions", _over_ratio("99th percentile", methods, "kl_p99", "KL, nats", False, 240)),
        ("The same most likely token", _over_ratio("Top-1 agreement", methods, "top1", "share of positions", False, 240))])
    rows = [[str(row["method"]), *_numbers(row)] for row in [*floor, *(row for rows in methods.values() for row in rows)]]
    return _svg.figure("Divergence over ratio", text, legend + charts + _svg.folded(
        "The same as a table", _svg.table("Divergence by method and ratio", HEADINGS, rows)))


HEADINGS = ("Method", "Ratio", "KL, nats", "KL p99", "Top-1", "Bytes")


def _numbers(row: Row) -> List[str]:
    return [number(float(row["ratio"])), number(float(row["kl"])), number(float(row["kl_p99"])),
            f"{float(row['top1']):.3f}", number(row.get("entry_bytes"))]


# --- Time ---

def _times(results: Results) -> Dict[str, Points]:
    """Seconds over tokens, by what they were spent on."""
    out: Dict[str, Points] = {}
    for row in sorted(results.speeds, key=lambda row: float(row["tokens"])):
        for key, value in row.items():
            if key.endswith("_seconds") and float(value) > 0:
                threads = re.fullmatch(r"restore_(\d+)_seconds", key)
                name = f"restore, {threads[1]} thread{'s' * (threads[1] != '1')}" if threads else TIMES.get(key, key)
                out.setdefault(name, []).append((float(row["tokens"]), float(value)))
    return out


def _speed(results: Results) -> str:
    times = _times(results)
    if not times:
        return ""
    every = [point for points in times.values() for point in points]
    lengths = sorted({tokens for tokens, _ in every})
    chart = Chart("Time over tokens", "The table below has the same numbers.",
                  Axis.logarithmic(lengths[0], lengths[-1], LEFT, RIGHT - 60 - LEFT),
                  Axis.logarithmic(min(y for _, y in every), max(y for _, y in every), FOOT, TOP - FOOT), WIDTH, FOOT + 44)
    chart.axes("tokens of the prompt", "seconds")
    for index, (name, points) in enumerate(times.items()):
        chart.curve(index, points, name, "seconds")
        chart.mark(*points[-1], name)
    by_length = [[number(tokens), *(number(dict(points).get(tokens)) for points in times.values())] for tokens in lengths]
    ratios = [float(row["ratio"]) for row in results.speeds if "ratio" in row]
    span = list(dict.fromkeys(map(number, (min(ratios), max(ratios))))) if ratios else []
    packed = f" at {' to '.join(span)} times" if span else ""
    return _svg.figure("Restore against prefill", f"Seconds to have the cache of a prompt, packed{packed}, on "
                       f"{results.facts.get('machine') or 'one machine'}.", chart.svg() + _svg.folded(
                           "The same as a table", _svg.table("Seconds by length", ("Tokens", *times), by_length)))


# --- Bytes and layers ---

def _of_one_prompt(results: Results, what: str) -> List[Row]:
    """The rows of the first prompt, of its first length, that tell of something."""
    rows = [row for row in results.single if row.get(what)]
    return [row for row in rows if all(row.get(key) == rows[0].get(key) for key in ("prompt", "tokens"))]


def _bars(results: Results) -> str:
    rows = _of_one_prompt(results, "parts")
    if not rows:
        return ""
    most = max(sum(row["parts"].values()) for row in rows)
    height, left = 24 * len(rows) + 6, 150
    chart = Chart("Bytes by part", "A bar for each entry; the table below has the numbers.", Axis(0, most, left, 690),
                  Axis(0, 1, height, -height), WIDTH, height)
    for i, row in enumerate(rows):
        at, y = float(left), 24 * i + 4
        for part, name in enumerate(PARTS):
            size = int(row["parts"].get(name, 0))
            width = 690 * size / most
            if size:
                chart.box(f"p{part}", at, y, width, 18, f"{row['method']}, {name}: {size:,} bytes")
            at += width
        chart.text("tick", left - 8, y + 13, "end", str(row["method"]))
        chart.text("tick", at + 6, y + 13, "start", f"{sum(row['parts'].values()):,} bytes")
    present = [name for name in PARTS if any(row["parts"].get(name) for row in rows)]
    cells = [[str(row["method"]), *(f"{int(row['parts'].get(name, 0)):,}" for name in present)] for row in rows]
    tokens = rows[0].get("tokens")
    length = f", {number(float(tokens))} tokens" if tokens else ""
    return _svg.figure("Bytes by part", f"Of the entries of one prompt, {rows[0].get('prompt')}{length}.", _svg.keys(
        [(f"p{PARTS.index(name)}", name) for name in present], line=False) + chart.svg() + _svg.folded(
            "The same as a table", _svg.table("Bytes by method and part", ("Method", *present), cells)))


def _layers(results: Results) -> str:
    """The last ratio of each method: errors of keys and of values."""
    rows = {method_of(row): row for row in _of_one_prompt(results, "layers")}
    if not rows:
        return ""
    charts: List[Tuple[str, str]] = []
    columns: Dict[str, Dict[int, float]] = {}
    for kind, title in (("K", "Keys"), ("V", "Values")):
        errors = {name: [(int(layer["layer"]), float(layer[kind])) for layer in row["layers"] if layer.get(kind) is not None]
                  for name, row in rows.items()}
        errors = {name: points for name, points in errors.items() if points}
        if not errors:
            continue
        last = max(x for points in errors.values() for x, _ in points)
        chart = Chart(f"{title}: error by layer", "The table below has the same numbers.", Axis.linear(0, last, LEFT, 460 - LEFT),
                      Axis.linear(0, max(y for points in errors.values() for _, y in points), 240, TOP - 240), 480, 284)
        chart.axes("layer", "relative error")
        for index, name in enumerate(rows):
            if name in errors:
                chart.curve(index, errors[name], name, "error")
        charts.append((title, chart.svg()))
        columns.update((f"{rows[name]['method']}, {kind}", dict(points)) for name, points in errors.items())
    layers = sorted({layer for column in columns.values() for layer in column})
    table = _svg.table("Relative error by layer", ("Layer", *columns), [
        [str(layer), *(f"{column[layer]:.4f}" if layer in column else "-" for column in columns.values())]
        for layer in layers])
    legend = _svg.keys([(f"k{i % _svg.COLOURS}", str(row["method"])) for i, row in enumerate(rows.values())], line=True)
    return _svg.figure("Error by layer", "Root of the squared error over the squared deviation, of each plane, at the largest "
                       "ratio that was asked of a method.", legend + _svg.panels(charts) + _svg.folded(
                           "The same as a table", table))


# --- The page ---

def _summary(results: Results) -> str:
    facts: List[Tuple[str, str]] = []
    methods = results.methods() if results.rows else {}
    name = "dict" if "dict" in methods else next((name for name in methods if name != FLOOR), None)
    if name is not None:
        row = min(methods[name], key=lambda row: abs(math.log(float(row["ratio"]) / 16)))
        facts += [(f"{float(row['ratio']):.1f}x", f"{name}, the ratio nearest to 16"), (number(float(row["kl"])), "KL there, nats"),
                  (f"{100 * float(row['top1']):.1f} %", "the same most likely token")]
    faster = [(float(row["tokens"]), float(row["prefill_seconds"]) / float(row["restore_seconds"])) for row in results.speeds
              if row.get("prefill_seconds") and row.get("restore_seconds")]
    if faster:
        facts.append((f"{max(faster)[1]:.1f}x", f"faster than a prefill, {number(max(faster)[0])} tokens"))
    return _svg.tiles(facts) if facts else ""


def _section(results: Results) -> str:
    shown = ("weights", "engine", "machine", "date")
    about = ", ".join(str(results.facts[key]) for key in shown if results.facts.get(key))
    parts = [_summary(results), _divergence(results) if results.rows else "", _speed(results), _bars(results), _layers(results)]
    return (f"<section><h2><bdi>{_svg.escaped(results.name)}</bdi> <small>{_svg.escaped(about)}</small></h2>\n"
            + "".join(parts) + "</section>\n")


def render(results: Sequence[Results]) -> str:
    return _svg.page("xkv fidelity", "What packed KV caches keep of a model's predictions, what they cost and what they save.",
                     [_section(one) for one in results])


def write(sources: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Draw results onto a page that appears when it is complete; a file of its name is replaced."""
    text = render(read(sources))
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parts_of(entry: Any) -> Dict[str, int]:
    """Bytes of an opened entry by what they are for: their sum is the file's size."""
    sizes = dict.fromkeys(PARTS, 0)
    for i, group in enumerate(entry.groups):
        side, exact, *chunks = entry.part_sizes(i)
        sizes[PARTS[1] if group.codec == "cross" else PARTS[2] if group.codec == "lossless" else PARTS[0]] += sum(chunks)
        sizes[PARTS[3]] += exact
        sizes[PARTS[4]] += side
    info = entry.info
    sizes[PARTS[5]], sizes[PARTS[6]] = info.framing_bytes, info.token_bytes
    sizes[PARTS[7]] = info.file_size - sum(sizes.values())
    return sizes


def layers_of(entry: Any) -> List[Row]:
    """Relative errors by layer and kind of plane."""
    planes = entry.geometry.planes
    errors: Dict[int, Row] = {}
    for group in entry.groups:
        for index, error in zip(group.planes, group.errors):
            errors.setdefault(planes[index].layer, {"layer": planes[index].layer})[planes[index].kind] = error
    return [errors[layer] for layer in sorted(errors)]
