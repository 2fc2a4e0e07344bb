"""check_report.py PAGE [FACTS] - whether a page of xkv-info --report is whole, closed in itself and accessible, and, with
the JSON lines of xkv-info --json on the same files, whether its numbers are theirs. Prints the text of the page."""
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

ELEMENTS = set("html head meta title style body header main section figure figcaption h1 h2 h3 h4 p small bdi a div span "
               "strong dl dt dd details summary table caption thead tbody tr th td svg g path rect circle text desc".split())
VOID = {"meta"}
XHTML = "{http://www.w3.org/1999/xhtml}"
THEMES = {"light": r"\A.*?:root \{(.*?)\}", "dark": r"prefers-color-scheme: dark.*?:root \{(.*?)\}"}


class Page(HTMLParser):
    """What a browser makes of it: elements, their attributes, balanced tags."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.styles, self.texts = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        assert tag in ELEMENTS, f"element {tag}"
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("src", "style", "xlink:href"), f"attribute {name}"
            assert name == "content" or not re.search(r"\b(nan|inf)\b", value or ""), f"{tag} {name}={value}"
            if name == "id":
                self.ids.append(value)
            if name == "href":
                assert value.startswith("#"), f"href {value}"
                self.references.append(value[1:])
            if name == "aria-labelledby":
                self.references += value.split()

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.texts).append(data)


def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def check_contrast(style):
    """WCAG 2: 4.5 for text, 3 for what is drawn."""
    for theme, pattern in THEMES.items():
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})\b", re.search(pattern, style, re.S).group(1)))
        for ground in ("page", "panel"):
            for name in ("ink", "muted", "blue", "orange", "green", "violet", "pink", "teal", "grey"):
                pair = sorted((luminance(colours[name]), luminance(colours[ground])))
                contrast = (pair[1] + 0.05) / (pair[0] + 0.05)
                least = 4.5 if name in ("ink", "muted", "blue") else 3
                assert contrast >= least, f"{theme}: {name} on {ground} has a contrast of {contrast:.2f}"


def check_page(text):
    page = Page()
    page.feed(text)
    page.close()
    style = "".join(page.styles)
    assert not page.open and len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    check_contrast(style)
    return page


def check_tree(text):
    """As XML: every drawing has a title and a description, every table a caption and headings."""
    tree = ElementTree.fromstring(text.split("\n", 1)[1])
    for drawing in tree.iter(XHTML + "svg"):
        if drawing.get("aria-hidden") == "true":
            continue
        names = drawing.get("aria-labelledby").split()
        assert drawing.get("role") == "img" and [drawing[0].get("id"), drawing[1].get("id")] == names
        assert drawing[0].text and drawing[1].text
    for table in tree.iter(XHTML + "table"):
        assert table[0].tag == XHTML + "caption" and table[0].text
        widths = {len(row) for row in table.iter(XHTML + "tr")}
        assert len(widths) == 1, f"{table[0].text}: rows of {widths} cells"
        assert all(cell.get("scope") for cell in table.iter(XHTML + "th"))
    return tree


def table_of(section, caption):
    """{first cell: other cells} of the table; None if there is none."""
    for table in section.iter(XHTML + "table"):
        if table[0].text == caption:
            rows = [["".join(cell.itertext()) for cell in row] for row in table.iter(XHTML + "tr")]
            return {row[0]: row[1:] for row in rows}
    return None


def number(text):
    return int(text.replace(",", ""))


def check_entry(section, facts):
    parts = table_of(section, "Bytes by part")
    assert number(parts["All"][0]) == facts["entry_bytes"]
    assert sum(number(row[0]) for name, row in parts.items() if name not in ("All", "Part")) == facts["entry_bytes"]
    assert f"{facts['ratio']:.2f}x" in "".join(section.itertext())
    errors = table_of(section, "Relative error by layer")
    assert (errors is None) == facts["lossless"]
    for group in facts["groups"]:
        for plane in group["planes"]:
            if errors is not None:
                shown = errors[str(plane["layer"])][errors["Layer"].index(plane["kind"])]
                assert shown == (f"{plane['error']:.4f}" if plane["error"] else "0"), (plane, shown)
    bands = table_of(section, "Bits per token, by components")
    coded = [group for group in facts["groups"] if "coded" in group]
    assert len(bands or [0]) - 1 == len(coded)
    # Exact code lengths: the streams have 64 to 128 bytes a chunk beyond them, and in `packed` are the other parts, too.
    chunks = -(-facts["tokens"] // facts["chunk_tokens"])
    tokens = facts["tokens"] - facts["sinks"] - facts["window"]
    if coded:
        bits = tokens * sum(float(row[5].replace(",", "")) for name, row in bands.items() if name != "Group")
        streams = number(parts.get("Coefficients", ["0"])[0]) + \
            number(parts.get("Coefficients of the cross stage", ["0"])[0])
        assert -0.01 * streams <= streams - bits / 8 <= 128 * chunks * len(coded) + 0.01 * streams, (streams, bits / 8)


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        text = file.read()
    page = check_page(text)
    tree = check_tree(text)
    sections = [s for s in tree.iter(XHTML + "section") if re.fullmatch(r"f\d+", s.get("id", ""))]
    if len(sys.argv) > 2:
        with open(sys.argv[2], encoding="utf-8") as file:
            facts = [json.loads(line) for line in file]
        facts = [fact for fact in facts if fact["ok"]]
        assert len(facts) == len(sections)
        for section, fact in zip(sections, facts):
            if fact.get("kind") != "dictionary":
                check_entry(section, fact)
    print(re.sub(r"\n\s*\n+", "\n", "\n".join(page.texts)))


if __name__ == "__main__":
    main()
