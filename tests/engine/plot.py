"""Line charts as SVG, without a dependency: log axes, lines labelled at their ends, light and dark pages."""
import math
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 860, 560
LEFT, RIGHT, TOP, BOTTOM = 92, 156, 84, 62  # margins of the plot area; labels of the lines stand in the right one
LABEL_SIZE = 13
LABEL_HEIGHT, CHARACTER = 16, 7.0           # of a label, to keep labels apart

PAGE = ("#ffffff", "#14171c")  # light, dark; likewise below
INK = ("#1b1f24", "#e8ebef")
MUTED = ("#5b6470", "#a3adb8")
GRID = ("#e6e9ed", "#2a3038")

# Of the methods, the same in all charts: this project's profiles strong, one hue for the systems of the xKV paper.
BLUE, GREEN, VIOLET = ("#1f6fd6", "#6cb0ff"), ("#12876a", "#3ecfa5"), ("#7b46c9", "#b794ff")
TEAL = ("#0b8296", "#45c6da")
PINK = ("#b8336f", "#f27fb2")
ORANGES = {"Single SVD": ("#c98a4b", "#f3c493"), "xKV-2": ("#c4732a", "#efa661"), "xKV-4": ("#b1560f", "#e58a36"),
           "xKV-8": ("#8a3d05", "#d06f1f")}
LOOKS = {"dict": dict(colour=BLUE, strong=True), "scalar": dict(colour=GREEN, strong=True),
         "svd": dict(colour=VIOLET, strong=True), "svd, 16-bit factors": dict(colour=VIOLET, dashed=True),
         "MiniCache": dict(colour=PINK), "MiniCache, all layers": dict(colour=PINK),
         **{method: dict(colour=colour) for method, colour in ORANGES.items()}}


def looks(method):
    if method.startswith("dict "):  # of another dictionary
        return dict(colour=TEAL, strong=True)
    return LOOKS.get(method, dict(colour=MUTED))


@dataclass
class Series:
    label: str
    points: list              # (x, y), in order of x
    colour: tuple             # light, dark
    strong: bool = False      # what the chart is about
    dashed: bool = False


@dataclass
class Axis:
    label: str
    low: float
    high: float
    ticks: dict = field(default_factory=dict)  # {value: text}
    marks: dict = field(default_factory=dict)  # the same, for dotted lines with the text inside the plot

    def place(self, value, start, length):
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return start + share * length


def log_axis(label, values, text, steps=(1, 2, 5)):
    """An axis around `values` with ticks at `steps` of each decade."""
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    candidates = [step * 10.0 ** decade for decade in decades for step in steps]
    inside = [value for value in candidates if low * 0.85 <= value <= high * 1.15]
    ticks = {value: text(value) for value in inside}
    return Axis(label, min([low * 0.85, *inside]), max([high * 1.15, *inside]), ticks)


def power_axis(label, values, text):
    """An axis around `values`, from the power of 2 below them on, with ticks at powers of 2."""
    first, high = math.floor(math.log2(min(values)) + 1e-9), max(values) * 1.08
    last = max(math.floor(math.log2(high)), first)
    return Axis(label, 2.0 ** first, high, {2.0 ** i: text(2 ** i) for i in range(first, last + 1)})


def chart(title, subtitle, x_axis, y_axis, series):
    """The SVG file's text."""
    series = [one for one in series if one.points]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
             f'height="{HEIGHT}" role="img" aria-label="{escape(title)}">', style(series),
             f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
             f'<text class="title" x="24" y="34">{escape(title)}</text>',
             f'<text class="muted" x="24" y="56">{escape(subtitle)}</text>']
    parts += axes(x_axis, y_axis)
    placed = [[place(point, x_axis, y_axis) for point in one.points] for one in series]
    order = sorted(range(len(series)), key=lambda i: series[i].strong)  # what matters is drawn last
    for i in order:
        parts += line(i, series[i], placed[i])
    parts += labels(series, placed)
    return "\n".join([*parts, "</svg>"]) + "\n"


def style(series):
    def rules(theme):
        page, ink, muted, grid = PAGE[theme], INK[theme], MUTED[theme], GRID[theme]
        out = [f".page{{fill:{page}}}", f"text{{fill:{ink};stroke:none}}", f".muted{{fill:{muted}}}",
               f".grid{{stroke:{grid}}}", f".mark{{stroke:{muted}}}", f".dot,.label{{stroke:{page}}}"]
        for i, one in enumerate(series):
            out += [f".line{i}{{stroke:{one.colour[theme]}}}", f".fill{i}{{fill:{one.colour[theme]}}}"]
        return "\n".join(out)
    fonts = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
    return (f"<style>\ntext{{font:{LABEL_SIZE}px {fonts}}}\n.title{{font-size:18px;font-weight:600}}\n"
            ".small{font-size:12px}\n.mark{stroke-dasharray:2 4}\n.middle{text-anchor:middle}\n.end{text-anchor:end}\n"
            ".bold{font-weight:600}\n"
            ".curve,.leader{fill:none;stroke-linejoin:round;stroke-linecap:round}\n"
            ".curve{stroke-width:1.75}\n.strong{stroke-width:2.75}\n.dashed{stroke-dasharray:6 5}\n"
            ".leader{stroke-width:1;opacity:.6}\n.dot{stroke-width:1.5}\n"
            ".label{paint-order:stroke;stroke-width:4px;stroke-linejoin:round}\n"
            f"{rules(0)}\n@media (prefers-color-scheme: dark){{\n{rules(1)}\n}}\n</style>")


def plot_width():
    return WIDTH - LEFT - RIGHT


def plot_height():
    return HEIGHT - TOP - BOTTOM


def place(point, x_axis, y_axis):
    return (x_axis.place(point[0], LEFT, plot_width()), y_axis.place(point[1], HEIGHT - BOTTOM, -plot_height()))


def axes(x_axis, y_axis):
    parts, right, bottom = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for value, text in y_axis.ticks.items():
        y = y_axis.place(value, bottom, -plot_height())
        parts += [f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>',
                  f'<text class="muted end" x="{LEFT - 10}" y="{y + 4.5:.1f}">{escape(text)}</text>']
    for value, text in x_axis.ticks.items():
        x = x_axis.place(value, LEFT, plot_width())
        parts += [f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>',
                  f'<text class="muted middle" x="{x:.1f}" y="{bottom + 20}">{escape(text)}</text>']
    for value, text in y_axis.marks.items():
        y = y_axis.place(value, bottom, -plot_height())
        parts += [f'<path class="mark" d="M{LEFT} {y:.1f}H{right}"/>',
                  f'<text class="muted small end" x="{right - 6}" y="{y - 5:.1f}">{escape(text)}</text>']
    for value, text in x_axis.marks.items():
        x = x_axis.place(value, LEFT, plot_width())
        parts += [f'<path class="mark" d="M{x:.1f} {TOP}V{bottom}"/>',
                  f'<text class="muted small" transform="translate({x - 5:.1f} {bottom - 8}) rotate(-90)">'
                  f'{escape(text)}</text>']
    middle = (TOP + bottom) / 2
    parts += [f'<text class="middle" x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 18}">{escape(x_axis.label)}</text>',
              f'<text class="middle" x="24" y="{middle:.1f}" transform="rotate(-90 24 {middle:.1f})">'
              f'{escape(y_axis.label)}</text>']
    return parts


def line(index, one, points):
    parts = []
    if len(points) > 1:
        kind = "curve" + " strong" * one.strong + " dashed" * one.dashed
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="{kind} line{index}" d="M{path}"/>')
    radius = 4.5 if one.strong or len(points) == 1 else 3
    for (x, y), value in zip(points, one.points):
        parts.append(f'<circle class="dot fill{index}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                     f'<title>{escape(one.label)}: {value[0]:.4g}, {value[1]:.4g}</title></circle>')
    return parts


def labels(series, placed):
    """One at the end of each line, moved up or down until they are apart; those near the right edge in a column."""
    ends = [points[-1] for points in placed]
    column = max(x for x, _ in ends) + 24
    lefts = [column if x > column - 60 else x + 10 for x, _ in ends]
    tops = spread([(left, y, CHARACTER * len(one.label)) for left, (_, y), one in zip(lefts, ends, series)])
    parts = []
    for i, (one, (x, y), left, top) in enumerate(zip(series, ends, lefts, tops)):
        if left == column or abs(top - y) > 6:
            parts.append(f'<path class="leader line{i}" d="M{x + 5:.1f} {y:.1f}L{left - 4:.1f} {top:.1f}"/>')
        parts.append(f'<text class="label fill{i}{" bold" * one.strong}" x="{left:.1f}" y="{top + 4.5:.1f}">'
                     f'{escape(one.label)}</text>')
    return parts


def spread(boxes):
    """Middles of the boxes (left, wanted middle, width) such that none overlap, near the wanted ones."""
    middles = [middle for _, middle, _ in boxes]
    order = sorted(range(len(boxes)), key=lambda i: middles[i])
    for _ in range(200):
        moved = False
        for a, i in enumerate(order):
            for j in order[a + 1:]:
                apart = boxes[i][0] + boxes[i][2] < boxes[j][0] or boxes[j][0] + boxes[j][2] < boxes[i][0]
                overlap = LABEL_HEIGHT - (middles[j] - middles[i])
                if not apart and overlap > 0.01:
                    middles[i] -= overlap / 2
                    middles[j] += overlap / 2
                    moved = True
        if not moved:
            break
        middles = [min(max(middle, TOP), HEIGHT - BOTTOM) for middle in middles]
    return middles
