"""A page of tables and charts in one file: inline SVG, no scripts, nothing from elsewhere. Its looks are those of
xkv-info --report: the same style sheet, and classes of the same meaning."""
from __future__ import annotations

import html
import itertools
import math
import pathlib
import unicodedata
from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence, Tuple

COLOURS = 8  # classes k0 .. k7


# --- Text ---

def escaped(text: str) -> str:
    """Without markup, and without characters that cannot be seen or turn what follows around."""
    shown = (c if unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}" for c in text)
    return html.escape("".join(shown))


def number(x: Optional[float]) -> str:
    """Three digits."""
    if x is None or not math.isfinite(x):
        return "-"
    size = abs(x)
    if 1000 <= size < 1e15:
        return f"{round(x):,}"
    if size and not 1e-4 <= size < 1e15:
        return f"{x:.2e}"
    return f"{x:.{max(0, 2 - math.floor(math.log10(size) + 1e-9))}f}" if size else "0"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """The first `texts` columns are text, the others numbers. Cells are text, not markup."""
    def marked(i: int) -> str:
        return ' class="text"' if i < texts else ""
    head = "".join(f'<th scope="col"{marked(i)}>{escaped(name)}</th>' for i, name in enumerate(headings))
    body = "".join(f'<tr><th scope="row">{escaped(row[0])}</th>' + "".join(
        f"<td{marked(i)}>{escaped(cell)}</td>" for i, cell in enumerate(row[1:], 1)) + "</tr>\n" for row in rows)
    return (f'<div class="scroll"><table><caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>\n{body}</tbody></table></div>\n")


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{escaped(summary)}</summary>\n{content}</details>\n"


def figure(title: str, text: str, content: str) -> str:
    return (f"<figure><figcaption><h3>{escaped(title)}</h3><p>{escaped(text)}</p></figcaption>\n{content}</figure>\n")


def panels(parts: Sequence[Tuple[str, str]]) -> str:
    """(title, content) of each, side by side."""
    return '<div class="panels">\n' + "".join(
        f'<div class="panel"><h4>{escaped(title)}</h4>{content}</div>\n' for title, content in parts) + "</div>\n"


def tiles(facts: Sequence[Tuple[str, str]]) -> str:
    """(number, what it is)"""
    return '<div class="tiles">\n' + "".join(
        f"<div><strong>{escaped(value)}</strong><span>{escaped(text)}</span></div>\n" for value, text in facts) + "</div>\n"


def keys(marks: Sequence[Tuple[str, str]], line: bool) -> str:
    """A legend of (class, name): lines, or filled boxes."""
    def mark(name: str) -> str:
        return (f'<path class="curve {name}" d="M1 6H23"/>' if line else
                f'<rect class="{name}" x="5" width="14" height="12"/>')
    return '<p class="keys">\n' + "".join(
        f'<span class="key"><svg viewBox="0 0 24 12" aria-hidden="true">{mark(name)}</svg>{escaped(text)}</span>\n'
        for name, text in marks) + "</p>\n"


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    style = pathlib.Path(__file__).with_name("report.css").read_text()
    return ('<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
            '<meta name="color-scheme" content="light dark"/>\n'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n"
            f"<title>{escaped(title)}</title>\n<style>\n{style}</style></head><body>\n"
            f"<header><h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p></header>\n<main>\n"
            + "".join(sections) + "</main></body></html>\n")


# --- Charts ---

@dataclass(frozen=True)
class Axis:
    """Values from low to high over pixels from start on, `length` of them, negative to the left or up."""

    low: float
    high: float
    start: float
    length: float
    log: bool = False

    @classmethod
    def linear(cls, low: float, high: float, start: float, length: float) -> Axis:
        """Both ends on ticks."""
        high = high if high > low else low + 1
        distance = _distance(high - low, length)
        return cls(distance * math.floor(low / distance + 1e-9), distance * math.ceil(high / distance - 1e-9), start, length)

    @classmethod
    def logarithmic(cls, low: float, high: float, start: float, length: float) -> Axis:
        """Both ends at 1, 2 or 5 times a power of ten."""
        bottom = max(step for step in _steps(low) if step <= low * (1 + 1e-9))
        top = min(step for step in _steps(max(high, 2 * low)) if step >= high * (1 - 1e-9) and step > bottom)
        return cls(bottom, top, start, length, True)

    def place(self, value: float) -> float:
        part = (math.log(value / self.low) / math.log(self.high / self.low) if self.log
                else (value - self.low) / (self.high - self.low))
        return self.start + self.length * min(max(part, 0.0), 1.0)

    def ticks(self) -> Iterator[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low) + 1e-9), math.ceil(math.log10(self.high) + 1e-9) + 1)
            steps = (1, 2, 5) if len(decades) <= 5 else (1,)
            every = (step * 10.0 ** decade for decade in decades for step in steps)
            yield from (x for x in every if self.low * (1 - 1e-9) <= x <= self.high * (1 + 1e-9))
            return
        distance = _distance(self.high - self.low, self.length)
        yield from (self.low + i * distance for i in range(round((self.high - self.low) / distance) + 1))


def _steps(value: float) -> List[float]:
    """1, 2 and 5 times powers of ten around a value."""
    decade = math.floor(math.log10(value))
    return [step * 10.0 ** (decade + i) for i in (-1, 0, 1) for step in (1, 2, 5)]


def _distance(span: float, length: float) -> float:
    """1, 2 or 5 times a power of ten: between two ticks."""
    raw = span / max(2, min(8, abs(length) / 40))
    unit = 10.0 ** math.floor(math.log10(raw))
    return unit * next(step for step in (1, 2, 5, 10) if raw <= 1.001 * step * unit)


_ids = itertools.count(1)


class Chart:
    """A drawing with a horizontal and a vertical axis."""

    def __init__(self, title: str, description: str, x: Axis, y: Axis, width: float, height: float) -> None:
        self.x, self.y = x, y
        self._labels: List[Tuple[float, float, str]] = []
        i = next(_ids)
        self._parts = [f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-labelledby="t{i} d{i}">'
                       f'<title id="t{i}">{escaped(title)}</title><desc id="d{i}">{escaped(description)}</desc>\n']

    def axes(self, x_name: str, y_name: str) -> None:
        right, top = self.x.start + self.x.length, self.y.start + self.y.length
        for value in self.y.ticks():
            y = self.y.place(value)
            self._parts.append(f'<path class="grid" d="M{self.x.start:.1f} {y:.1f}H{right:.1f}"/>\n')
            self.text("tick", self.x.start - 6, y + 4, "end", _tick(value))
        for value in self.x.ticks():
            self.text("tick", self.x.place(value), self.y.start + 16, "middle", _tick(value))
        self.text("axis", self.x.start, top - 10, "start", y_name)
        self.text("axis", self.x.start + self.x.length / 2, self.y.start + 34, "middle", x_name)

    def text(self, name: str, x: float, y: float, anchor: str, text: str) -> None:
        self._parts.append(f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>\n')

    def curve(self, index: int, points: Sequence[Tuple[float, float]], name: str, what: str) -> None:
        """Points in order of x, joined, each with a tooltip that begins with `name`; `what`: unit of y."""
        colour, square = f"k{index % COLOURS}", index >= COLOURS
        places = [(self.x.place(x), self.y.place(y)) for x, y in points]
        if len(places) > 1:
            way = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            self._parts.append(f'<path class="curve {colour}" d="M{way}"/>\n')
        for (x, y), (px, py) in zip(points, places):
            shape = (f'rect class="point {colour}" x="{px - 3.5:.1f}" y="{py - 3.5:.1f}" width="7" height="7"' if square
                     else f'circle class="point {colour}" cx="{px:.1f}" cy="{py:.1f}" r="4"')
            tip = escaped(f"{name}, {number(x)}: {what} {number(y)}")
            self._parts.append(f"<{shape}><title>{tip}</title></{shape.split()[0]}>\n")

    def mark(self, x: float, y: float, text: str) -> None:
        """A label beside a point; those that would lie on each other are moved apart when the drawing is done."""
        self._labels.append((self.x.place(x) + 8, self.y.place(y) + 4, text))

    def box(self, name: str, x: float, y: float, width: float, height: float, tip: str) -> None:
        self._parts.append(f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
                           f"<title>{escaped(tip)}</title></rect>\n")

    def svg(self) -> str:
        for x, y, text in _apart(self._labels):
            self.text("note", x, y, "start", text)
        return "".join(self._parts) + "</svg>\n"


def _tick(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.9e-4 else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _apart(labels: Sequence[Tuple[float, float, str]]) -> List[Tuple[float, float, str]]:
    """From the top down each is moved below those that it would lie on."""
    placed: List[Tuple[float, float, str]] = []
    for x, y, text in sorted(labels, key=lambda label: label[1]):
        while True:
            near = [other for other in placed if abs(other[1] - y) < 12 and
                    other[0] < x + 7 * len(text) and x < other[0] + 7 * len(other[2])]
            if not near:
                break
            y = max(other[1] for other in near) + 12.5
        placed.append((x, y, text))
    return placed
