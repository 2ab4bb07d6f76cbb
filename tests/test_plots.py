"""Plots as SVG: valid, and where the numbers say."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from sslzoo.report.plots import BLUE, ORANGE, Dot, dots, panel, scatter, ticks

SVG = "{http://www.w3.org/2000/svg}"


def parts(svg: str, name: str) -> list:
    return list(ElementTree.fromstring(svg).iter(SVG + name))


@pytest.mark.parametrize(
    ("low", "high"), [(44.3, 66.3), (0, 1), (-0.9, 0.2), (53.0, 53.1), (5, 5), (0, 0), (1e-4, 3e5)]
)
def test_ticks_are_few_round_and_cover_the_values(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 1 <= len(marks) <= 7
    steps = np.diff(marks)
    assert np.allclose(steps, steps[0] if len(steps) else 0)


def plot(**lines):
    rows = [
        Dot("simclr", "65.5", 65.5, (64.5, 66.5), [65.0, 66.0], 53.0, best=True),
        Dot("cmc", "59.5", 59.5, None, [59.5], None),
    ]
    return dots(rows, "kNN", lines)


def test_dots_bars_seeds_rings_and_baselines_lie_on_one_scale():
    svg = plot(**{"raw pixels": 44.3})
    marks = {text.text.split()[0]: float(text.get("x")) for text in parts(svg, "text") if text.text[0].isdigit()}

    def x(value: float) -> float:
        return marks["45"] + (marks["65"] - marks["45"]) * (value - 45) / 20

    circles = {(c.get("r"), c.get("stroke")): float(c.get("cx")) for c in parts(svg, "circle")}
    assert circles["4", ORANGE] == pytest.approx(x(53.0), abs=0.1)
    means = [float(c.get("cx")) for c in parts(svg, "circle") if c.get("r") == "5"]
    assert means == pytest.approx([x(65.5), x(59.5)], abs=0.1)
    seeds = [float(c.get("cx")) for c in parts(svg, "circle") if c.get("r") == "2"]
    assert seeds == pytest.approx([x(65.0), x(66.0)], abs=0.1)
    bar = next(line for line in parts(svg, "line") if line.get("stroke") == BLUE)
    assert (float(bar.get("x1")), float(bar.get("x2"))) == pytest.approx((x(64.5), x(66.5)), abs=0.1)
    (baseline,) = [line for line in parts(svg, "line") if line.get("stroke-dasharray")]
    assert float(baseline.get("x1")) == pytest.approx(x(44.3), abs=0.1)


def test_names_are_inside_the_drawing_and_apart_from_each_other():
    svg = dots(
        [Dot("a_method_of_a_long_name, optim.lr=0.1", "12.3 ± 0.4", 12.3)], "", {"raw pixels": 12.0, "random": 12.01}
    )
    for text in parts(svg, "text"):
        reach = 6.2 * len(text.text)
        if text.get("text-anchor") == "end":
            assert float(text.get("x")) - reach > 0, text.text
    above = [(float(t.get("x")), float(t.get("y"))) for t in parts(svg, "text") if t.text in ("raw pixels", "random")]
    assert abs(above[0][1] - above[1][1]) > 10


def test_a_value_that_all_share_is_drawn():
    assert len(parts(dots([Dot("a", "0", 0.0), Dot("b", "0", 0.0)], "", {}), "circle")) == 2


def points(path) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path.get("d"))]


def test_a_panel_draws_own_lines_over_others_within_its_frame():
    svg = panel([[(0, 1.0), (1, 3.0)]], "loss", [[(0, 2.0), (2, 9.0)]], [(2.0, ORANGE)], y_range=(1.0, 3.0))
    other, own = parts(svg, "path")
    assert own.get("stroke") == BLUE
    (x0, y0), (x1, y1) = points(own)
    assert x0 < x1
    assert y0 > y1  # upwards
    assert points(other)[1][1] == y1  # cut at the frame, where 3 is
    assert points(other)[1][0] > x1  # both on one axis
    (baseline,) = [line for line in parts(svg, "line") if line.get("stroke-dasharray")]
    assert float(baseline.get("y1")) == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_a_logarithmic_panel_has_decades_and_leaves_out_what_has_no_logarithm():
    svg = panel([[(1, 1.0), (2, 0.1), (3, 0.0), (4, 1e-9)]], "spectrum", y_range=(1e-4, 1.0), log=True)
    (line,) = parts(svg, "path")
    (_, first), (_, second), (_, last) = points(line)
    assert second - first == pytest.approx((last - first) / 4, abs=0.1)  # one decade of four
    assert {"1", "0.1", "0.01", "1e-3", "1e-4"} <= {text.text for text in parts(svg, "text")}


@pytest.mark.parametrize("lines", [[], [[]], [[(0, float("nan"))]]])
def test_an_empty_panel_says_so(lines):
    assert "nothing was logged" in panel(lines, "kNN")


def test_one_point_is_a_line_one_can_see():
    (path,) = parts(panel([[(1, 0.5)]], "kNN"), "path")
    assert path.get("d").endswith("h0")


def test_every_point_of_a_map_is_there_in_the_colour_of_its_class():
    places = np.random.default_rng(0).standard_normal((30, 2))
    labels = np.arange(30) % 3 - 1  # one of them is unknown
    paths = parts(scatter(places, labels, "map"), "path")
    assert [path.get("d").count("M") for path in paths] == [10] * 3
    assert len({path.get("stroke") for path in paths}) == 3
    drawn = np.array([points(path) for path in paths]).reshape(-1, 2)
    assert drawn.min() > 0
    assert drawn.max() < 300
    by_class = np.concatenate([places[labels == label] for label in (-1, 0, 1)])
    assert np.corrcoef(drawn[:, 0], by_class[:, 0])[0, 1] == pytest.approx(1, abs=1e-3)


def test_names_cannot_break_the_drawing():
    svg = dots([Dot("<b>&\"'", "<", 1.0)], '"<', {"<i>": 2.0})
    assert {"<b>&\"'", "<", "<i>"} <= {text.text for text in parts(svg, "text")}
