"""The page of python -m xkv.fidelity --report, on results that were recorded: its structure, its figures, its safety."""
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

import xkv
from xkv import report
from xkv._svg import Axis, number
from xkv.fidelity import main, means

FIDELITY = REPOSITORY / "tests" / "engine" / "results" / "fidelity-2026-11-26.json"
RESTORE = REPOSITORY / "tests" / "bench" / "results" / "restore-2026-11-27.json"


@pytest.fixture(scope="module")
def check():
    """What xkv-info's page is checked by."""
    spec = importlib.util.spec_from_file_location("check_report", REPOSITORY / "tests" / "cli" / "check_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def drawn(check, tmp_path):
    """Draws documents; the text of the page, and its sections by the name of the model."""
    def draw(*documents):
        for i, document in enumerate(documents):
            (tmp_path / f"{i}.json").write_text(json.dumps(document))
        sources = [tmp_path / f"{i}.json" for i in range(len(documents))]
        assert main(["--report", str(tmp_path / "page.html"), "--from", *map(str, sources)]) == 0
        text = (tmp_path / "page.html").read_text()
        check.check_page(text)  # closed in itself, no URLs, both colour schemes with enough contrast
        assert not re.search(r"https?://(?!www\.w3\.org/1999/xhtml\")", text)
        sections = check.check_tree(text).iter(f"{check.XHTML}section")
        return text, {section.find(f".//{check.XHTML}bdi").text: section for section in sections}
    return draw


def document(**more):
    row = dict(prompt="a", tokens=100, method="dict 16x", ratio=16.2, kl=0.005, kl_p99=0.04, top1=0.96, entry_bytes=1000)
    return {"model": "m", "following": 50, "rows": [row], **more}


def test_figures_are_those_of_the_results(check, drawn):
    recorded = json.loads(FIDELITY.read_text())
    _, sections = drawn(recorded)
    assert list(sections) == ["smollm2", "qwen"]
    for sweep in recorded["sweeps"]:
        section = sections[sweep["model"]]
        shown = check.table_of(section, "Divergence by method and ratio")
        rows = {row["method"]: row for row in sweep["means"] if row["tokens"] == 1024}
        assert set(shown) == {"Method", *rows}
        for method, row in rows.items():
            ratio, kl, kl_p99, top1, size = shown[method]
            assert float(ratio) == pytest.approx(row["ratio"], rel=6e-3)
            assert float(kl) == pytest.approx(row["kl"], rel=6e-3)
            assert float(kl_p99) == pytest.approx(row["kl_p99"], rel=6e-3)
            assert top1 == f"{row['top1']:.3f}"
            assert int(size.replace(",", "")) == round(row["entry_bytes"])
        tips = [tip.text for tip in section.iter(f"{check.XHTML}title")]
        assert sum(tip.startswith("dict, ") for tip in tips) == 3 * 6  # six ratios on three charts
        best = min((row for row in rows.values() if row["method"].startswith("dict ")), key=lambda row: abs(row["ratio"] - 16))
        assert f"{best['ratio']:.1f}x" in [tile.text for tile in section.iter(f"{check.XHTML}strong")]


def test_points_lie_where_the_axes_say(check, drawn):
    """KL 0.001 and 0.1 at ratios 10 and 20, on axes from 0 to 20 and from 0.001 to 0.1: corners and the middle."""
    rows = [dict(document()["rows"][0], method=f"svd {ratio}x", ratio=ratio, kl=kl)
            for ratio, kl in ((10, 0.1), (20, 0.001), (20, 0.01))]
    _, sections = drawn(document(rows=rows))
    drawing = next(s for s in sections["m"].iter(f"{check.XHTML}svg") if s.get("role") == "img")
    points = {(float(c.get("cx")), float(c.get("cy"))) for c in drawing.iter(f"{check.XHTML}circle")}
    left, right, top, foot = report.LEFT, report.RIGHT, report.TOP, report.FOOT
    assert points == {((left + right) / 2, top), (right, foot), (right, (top + foot) / 2)}


def test_speed(check, drawn):
    speeds = [dict(tokens=t, ratio=16.0, prefill_seconds=t / 300, restore_seconds=t / 6000) for t in (2048, 256)]
    text, sections = drawn(document(speeds=speeds), json.loads(RESTORE.read_text()))
    shown = check.table_of(sections["m"], "Seconds by length")
    assert shown == {"Tokens": ["prefill by the engine", "restore"], "256": ["0.853", "0.0427"], "2,048": ["6.83", "0.341"]}
    assert "20.0x" in [tile.text for tile in sections["m"].iter(f"{check.XHTML}strong")]
    for file in (file for part in json.loads(RESTORE.read_text())["documents"] for file in part["files"]):
        size = file["lengths"][0]["raw_bytes"] // file["lengths"][0]["tokens"]
        shown = check.table_of(sections[f"{file['cache']}, {size:,} bytes a token"], "Seconds by length")
        for length in file["lengths"]:
            cells = dict(zip(shown["Tokens"], shown[number(length["tokens"])]))
            for run in length["restore"]:
                name = f"restore, {run['threads']} thread{'s' * (run['threads'] > 1)}"
                assert float(cells[name]) == pytest.approx(run["seconds"], rel=6e-3)
            assert float(cells["reading the raw cache, from disk"]) == pytest.approx(length["read_raw_cold_seconds"], rel=6e-3)


def test_bytes_and_errors_are_those_of_entries(cache, check, drawn, dictionary):
    rows, errors = [], {}
    for method, options in (("svd 8x", dict(profile="svd", ratio=8)), ("scalar 4x", dict(profile="scalar", ratio=4)),
                            ("dict 8x", dict(dictionary=dictionary, ratio=8))):
        packed = xkv.pack(cache, **options)
        with xkv.open(packed, dictionary if "dictionary" in options else None) as entry:
            rows.append(dict(document()["rows"][0], method=method, ratio=packed.report.ratio, entry_bytes=len(packed),
                             parts=report.parts_of(entry), layers=report.layers_of(entry)))
            planes = entry.geometry.planes
            errors[method] = {(planes[i].layer, planes[i].kind): e for g in entry.groups for i, e in zip(g.planes, g.errors)}
    nothing = dict(parts=dict.fromkeys(report.PARTS, 1), layers=[dict(layer=0, K=9.0, V=9.0)])
    shorter = [dict(row, tokens=50, **nothing) for row in rows]  # drawn is the first length
    _, sections = drawn(document(rows=rows + shorter))
    parts = check.table_of(sections["m"], "Bytes by method and part")
    for row in rows:
        assert sum(int(cell.replace(",", "")) for cell in parts[row["method"]]) == row["entry_bytes"]
    assert parts["dict 8x"][parts["Method"].index("Coefficients of the cross stage")] != "0"
    shown = check.table_of(sections["m"], "Relative error by layer")
    for method, found in errors.items():
        assert len(found) == 60
        for (layer, kind), error in found.items():
            assert shown[str(layer)][shown["Layer"].index(f"{method}, {kind}")] == f"{error:.4f}"


def test_what_a_document_says_is_no_markup(drawn):
    name = '<script>alert("x")</script>\u202e&amp;'
    text, sections = drawn(document(model=name, rows=[dict(document()["rows"][0], method="<img src=x> 4x", prompt="</p>")]))
    assert "<script" not in text and "<img" not in text and "\u202e" not in text
    assert list(sections) == [name.replace("\u202e", "\\u202e")]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": "m", "rows": []}', '{"sweeps": [{"rows": [3]}]}', "3",
                                  '{"model": "m", "rows": [{"method": "a", "ratio": "x", "kl": 1, "kl_p99": 1, "top1": 1}]}',
                                  '{"model": "m", "rows": [{"method": "a", "ratio": -1, "kl": 1, "kl_p99": 1, "top1": 1}]}'])
def test_other_files_are_refused(text, tmp_path, capsys):
    (tmp_path / "odd.json").write_text(text)
    (tmp_path / "page.html").write_text("before")
    assert main(["--report", str(tmp_path / "page.html"), "--from", str(tmp_path / "odd.json")]) == 1
    assert "odd.json: the" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_as_a_command(tmp_path):
    """It needs neither an engine nor a model to draw what was recorded."""
    run = [sys.executable, "-m", "xkv.fidelity"]
    (line,) = re.findall(r"^python -m (xkv.fidelity --from .*)$", (REPOSITORY / "README.md").read_text(), re.M)
    (tmp_path / "tests").symlink_to(REPOSITORY / "tests")
    subprocess.run([sys.executable, "-m", *line.split()], check=True, cwd=tmp_path)
    assert (tmp_path / "page.html").read_text().endswith("</main></body></html>\n")
    for wrong in ([], ["--from", FIDELITY], ["model.gguf"]):
        assert subprocess.run([*run, *wrong], capture_output=True).returncode == 2


def test_means():
    rows = [dict(method="dict 8x", tokens=t, prompt=p, ratio=8, kl=kl, kl_p99=1, top1=1, entry_bytes=10)
            for t, p, kl in ((5, "a", 0.1), (5, "b", 0.3), (9, "a", 0.5))]
    (mean,) = means(rows)
    assert (mean["tokens"], mean["prompt"], mean["kl"], mean["delta_nll"]) == (5, "mean of 2", pytest.approx(0.2), None)


@pytest.mark.parametrize("high", [0.003, 1, 7, 31.1, 4096])
def test_axes(high):
    linear, log = Axis.linear(0, high, 50, 400), Axis.logarithmic(high / 300, high, 50, -400)
    ticks = np.array(list(linear.ticks()))
    assert 3 <= len(ticks) <= 12 and np.allclose(np.diff(ticks), ticks[1] - ticks[0]) and ticks[-1] >= high > ticks[-2]
    assert (linear.place(0), linear.place(linear.high)) == (50, 450)
    assert (log.place(log.low), log.place(log.high)) == (50, -350) and log.low <= high / 300 and log.high >= high
    digits = {f"{x:.0e}"[0] for x in [*log.ticks(), log.low, log.high]}
    assert digits <= set("125") and 3 <= len(list(log.ticks())) <= 12
    assert log.place(np.sqrt(log.low * log.high)) == pytest.approx(-150)


@pytest.mark.parametrize("x, text", [(0, "0"), (0.00574, "0.00574"), (3.2e-6, "3.20e-06"), (16.07, "16.1"), (999.6, "1000"),
                                     (12550892, "12,550,892"), (float("nan"), "-"), (None, "-")])
def test_numbers(x, text):
    assert number(x) == text
