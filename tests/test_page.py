"""The page: says the right thing, hides nothing, and opens in a browser without an error or a request."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from finished import evaluated, pretrained
from sslzoo.report.answer import sentence
from sslzoo.report.embedding import Map
from sslzoo.report.found import read
from sslzoo.report.page import SECTIONS, Made, diagnosis, page
from sslzoo.report.table import Cell, tabulate

MADE = Made("python -m sslzoo task=compare runs=zoo", "zoo", "2026-01-02 03:04", {"sslzoo": "0.1.0"})
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def map_of(name, attention=None) -> Map:
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    return Map(name, rng.standard_normal((30, 2)), labels, {0: "cat", 1: "dog", 2: "<cow>"}, np.ones(8), attention)


def zoo(folder):
    """Two methods of two seeds, one of one seed, evaluations of both, a broken and an unfinished run."""
    for seed, knn in ((0, 0.60), (1, 0.64)):
        moco = pretrained(folder / f"moco/{seed}", seed=seed, knn=knn)
        simclr = pretrained(folder / f"simclr/{seed}", "simclr", seed=seed, knn=knn - 0.01)
        for name, run in (("moco", moco), ("simclr", simclr)):
            told = {"linear_top1": knn + 0.1, "linear_top5": 0.95, "linear_top1_interval": [0.6, 0.8]}
            evaluated(folder / f"linear/{name}/{seed}", run, method=name, scores=told)
    pretrained(folder / "byol/0", "byol", knn=0.45)
    (pretrained(folder / "dino/0", "dino") / "summary.json").unlink()
    (folder / "cut").mkdir()
    (folder / "cut/summary.json").write_text("{")
    return read(folder)


def page_of(found, maps=(), notes=()) -> str:
    return page(tabulate(found.runs), found, maps, notes, MADE)


class Outline(HTMLParser):
    """Sections, tags that stay open, and every address a page could ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.sections, self.open, self.addresses, self.text = {}, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href", "data", "action") if attributes.get(name)]
        if tag == "section":
            self.sections[attributes["id"]] = ""
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "section" in self.open:
            name = list(self.sections)[-1]
            self.sections[name] += f" {data}"


def test_every_section_is_there_in_order_and_no_tag_stays_open(tmp_path):
    outline = Outline(page_of(zoo(tmp_path), [map_of("random init"), map_of("moco", b"\x89PNG")]))
    assert list(outline.sections) == list(SECTIONS)
    assert not outline.open
    assert all(len(text) > 20 for text in outline.sections.values())


def test_the_page_holds_all_it_shows(tmp_path):
    text = page_of(zoo(tmp_path), [map_of("moco", b"\x89PNG")])
    for address in Outline(text).addresses:
        assert address.startswith("data:") or address.removeprefix("#") in SECTIONS
    assert not re.search(r"url\(|@import|<link(?! rel=\"icon\" href=\"data:)", text)
    assert set(re.findall(r"\w+://[^\"' <]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in text


def test_the_answer_names_the_best_its_gains_and_who_cannot_be_told_from_it(tmp_path):
    table = tabulate(zoo(tmp_path).runs)
    text = re.sub("<.*?>", "", sentence(table, "photos"))
    assert text.startswith(
        "moco leads: kNN top-1 62.0 ± 2.8 % (2 seeds), +12.0 over its random start and +22.0 over raw"
    )
    assert "Within two standard errors of it: simclr." in text
    assert "1 other of one seed" in text


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([("simclr", 0, 0.3), ("simclr", 1, 0.31)], "All others are more than two standard errors behind."),
        ([("simclr", 0, 0.3)], "One seed does not tell a method from luck"),
    ],
)
def test_the_answer_says_what_the_seeds_allow(tmp_path, others, told):
    for method, seed, knn in [("moco", 0, 0.60), ("moco", 1, 0.61), *others]:
        pretrained(tmp_path / method / str(seed), method, seed, knn)
    text = sentence(tabulate(read(tmp_path).runs), "photos")
    assert told in text


def test_one_seed_each_is_said_to_be_too_few(tmp_path):
    pretrained(tmp_path / "moco")
    pretrained(tmp_path / "simclr", "simclr", knn=0.3)
    assert "One seed does not tell a method from luck" in page_of(read(tmp_path))
    assert "± -" in page_of(read(tmp_path))


def test_what_is_not_counted_is_named(tmp_path):
    answer = Outline(page_of(zoo(tmp_path))).sections["answer"]
    assert f"{tmp_path}/dino/0: not finished" in answer
    assert f"{tmp_path}/cut/summary.json is damaged" in answer


def test_why_there_is_no_map_is_said(tmp_path):
    pretrained(tmp_path / "moco")
    sections = Outline(page_of(read(tmp_path), notes=["no map of moco: backbone=x is no file"])).sections
    assert "no map of moco: backbone=x is no file" in sections["maps"]
    assert "No backbone that was opened is a Vision Transformer" in sections["attention"]


def test_evaluations_alone_make_a_page(tmp_path):
    evaluated(tmp_path / "e", "timm/resnet50", method="timm/resnet50", scores={"linear_top1": 0.7, "odd": 1.5})
    text = unescape(page_of(read(tmp_path)))
    assert "timm/resnet50" in text
    assert "No training run was read" in text


def test_names_cannot_break_the_page(tmp_path):
    evil = "<script>alert('1')</script>"
    pretrained(tmp_path / "<b>", evil, summary={"data": evil, "command": evil})
    text = page_of(read(tmp_path), [map_of(evil)], [evil])
    assert evil not in text
    assert text.count("<script>") == 1
    assert not Outline(text).open


def test_commands_and_hashes_are_shown(tmp_path):
    provenance = Outline(page_of(zoo(tmp_path))).sections["provenance"]
    for words in (
        "python -m sslzoo method=simclr seed=1",
        "hash1",
        MADE.command,
        "torch 2.15.0",
        str(tmp_path / "moco/0"),
    ):
        assert words in provenance


def cell_of(*values):
    cell = Cell()
    for seed, value in enumerate(values):
        cell.add(seed, value)
    return cell


@pytest.mark.parametrize(
    ("spread", "knn", "start", "finding"),
    [
        (0.001, cell_of(0.6, 0.61), cell_of(0.5, 0.5), "collapsed"),
        (0.7, cell_of(0.4, 0.41), cell_of(0.5, 0.5), "no better than its random start"),
        (0.7, cell_of(0.50, 0.60), cell_of(0.5, 0.5), "within two standard errors of its random start"),
        (0.7, cell_of(0.60, 0.61), cell_of(0.5, 0.5), "learned"),
        (0.7, cell_of(0.60), cell_of(0.5), "better than its random start, in one seed"),
        (0.7, None, None, "not collapsed; without labels no more can be told"),
    ],
)
def test_diagnosis(spread, knn, start, finding):
    assert diagnosis(spread, knn, start)[0] == finding


PROBE = """<script>addEventListener("load", () => {
  const head = document.querySelectorAll("#table th")[1], found = {};
  const names = () => [...document.querySelectorAll("#table tbody tr")].map((row) => row.cells[0].textContent);
  head.click(); found.down = names(); head.click(); found.up = names();
  found.sections = [...document.querySelectorAll("section")].map((s) => [s.id, s.getBoundingClientRect().height > 40]);
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.wide = document.documentElement.scrollWidth - innerWidth;
  found.images = [...document.images].filter((image) => image.loading !== "lazy" && !image.naturalWidth).length;
  document.title = JSON.stringify(found);
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_opens_it_from_disk_without_an_error_or_a_request(tmp_path):
    file = tmp_path / "report.html"
    text = page_of(zoo(tmp_path / "runs"), [map_of("random init"), map_of("moco")])
    file.write_text(text.replace("</body>", PROBE + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--enable-logging=stderr", "--window-size=1280,900", "--virtual-time-budget=3000"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=200)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(unescape(re.search("<title>(.*?)</title>", done.stdout, re.S)[1]))
    assert found["sections"] == [[name, True] for name in SECTIONS]
    assert found["requests"] == []
    assert found["wide"] <= 0  # nothing sticks out of a laptop's window
    assert found["down"][0] == "moco"
    assert found["up"] == found["down"][::-1]
