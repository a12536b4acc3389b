#!/usr/bin/env python3
"""check_report.py PAGE ROWS COLUMNS DOMAINS CHAINS TEXT.. - a report is well-formed XML and HTML, fetches and runs nothing, draws
ROWS x COLUMNS cells of load by rank, DOMAINS x DOMAINS of similarity and CHAINS chains, with finite numbers inside its pictures,
and every TEXT stands in it as text."""
import html.parser
import re
import sys
import xml.etree.ElementTree as tree

path, rows, columns, domains, chains = sys.argv[1], *map(int, sys.argv[2:6])
page = open(path, encoding="utf-8").read()
root = tree.fromstring(page.split("\n", 1)[1])  # behind <!DOCTYPE html>
assert page.startswith("<!DOCTYPE html>\n")


class Parser(html.parser.HTMLParser):
    open_tags = []

    def handle_starttag(self, tag, attributes):
        self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass


parser = Parser()
parser.feed(page)
assert not parser.open_tags
for element in root.iter():
    assert element.tag in {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "section", "svg",
                           "g", "rect", "line", "circle", "text"}, element.tag
    assert not {"href", "src", "onload", "onclick"} & set(element.attrib)
assert "url(" not in page and "@import" not in page and "http" not in page
assert not re.search(r"\b(nan|inf)\b", page.lower())

for picture in root.iter("svg"):
    width, height = map(float, picture.attrib["viewBox"].split()[2:])
    assert picture.attrib["aria-label"]
    for rect in picture.iter("rect"):
        x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        assert -0.1 <= x and x + w <= width + 0.1 and -0.1 <= y and y + h <= height + 0.1 and w > 0 and h >= 0
        assert 0 <= float(rect.attrib.get("fill-opacity", 1)) <= 1
    for text in picture.iter("text"):
        assert 0 <= float(text.attrib["x"]) <= width and (text.text or "").strip()
titles = [title.text for picture in root.iter("svg") for title in picture.iter("title")]
cells = [t for t in titles if re.fullmatch(r"layer \d+, rank \d+: \S+", t)]
assert len(set(c.split(":")[0] for c in cells)) == rows * columns, len(cells)
by_layer = {}
for cell in cells:
    by_layer.setdefault(cell.split(",")[0], []).append(float(cell.split(": ")[1]))
assert all(abs(sum(values) / columns - 1) < 0.01 for values in by_layer.values())
alike = [r for picture in root.iter("svg") for r in picture.iter("rect") if r.attrib.get("class") == "alike" and len(r)]
assert len(alike) == (domains * domains if domains > 1 else 0), len(alike)
circles = [c for picture in root.iter("svg") for c in picture.iter("circle") if c.attrib.get("class") == "node"]
assert len(circles) == chains * rows, len(circles)
text = " ".join(root.itertext())
for wanted in sys.argv[6:]:
    assert wanted in text, wanted
