"""The grid's table with known numbers: deltas of either convention, marks, the paper's numbers, several step counts."""

import csv
import io

import pytest

from sslzoo.report.grid import Column, Grid, Row, along, csv_text, difference, figure, markdown
from sslzoo.report.table import Cell

RANDOM, SELF, PRE, BOTH = Row("random"), Row("random", True), Row("imagenet"), Row("imagenet", True)


def cell(*values: float) -> Cell:
    found = Cell()
    for seed, value in enumerate(values):
        found.add(seed, value / 100)
    return found


def filled(kind: str, rows, columns, values, controls=()) -> Grid:
    grid = Grid(kind, "scenes", list(rows), list(columns))
    for row, line in zip(rows, values, strict=True):
        for column, each in zip(columns, line, strict=True):
            grid.scores[row, column] = cell(*each)
            grid.curves[row, column] = [[(k * 25, 100, each[0] * k / 400) for k in (1, 2, 3, 4)]]
    for row, line in controls:
        for column, each in zip(columns, line, strict=True):
            grid.controls[row, column] = cell(*each)
            grid.control_curves[row, column] = [[(100, 200, one / 200), (200, 200, one / 100)] for one in each]
    return grid


def lines(grid: Grid) -> dict[str, list[str]]:
    """The first table's rows by name."""
    table = markdown(grid).split("##")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: [each.strip(" |") for each in row[1:]] for row in rows}


TWENTY, ALL = Column("20%", "s4", 0.2), Column("100%", "s4", 1.0)


@pytest.fixture
def fraction() -> Grid:
    values = [
        [(30, 31, 32), (44, 44.2, 44.4)],
        [(34, 35, 36), (44.3, 44.4, 44.5)],
        [(33, 34, 35), (43, 43.2, 43.4)],
        [(36, 36, 36), (44.5, 44.6, 44.7)],
    ]
    controls = [(SELF, [(34.5, 35, 35.5), (45, 45.2, 45.4)])]
    return filled("fraction", (RANDOM, SELF, PRE, BOTH), (TWENTY, ALL), values, controls)


def test_table_three_compares_with_the_same_init(fraction):
    found = lines(fraction)
    assert found["setup"] == ["20%", "100%"]
    assert found["random"] == ["31.0 ± 1.0 (3)", "44.2 ± 0.2 (3)"]
    assert found["random + self-training"] == ["35.0 ± 1.0 (3) (+4.0)", "44.4 ± 0.1 (3) (+0.2 ~)"]
    assert found["imagenet"] == ["34.0 ± 1.0 (3)", "43.2 ± 0.2 (3)"]
    assert found["imagenet + self-training"] == ["36.0 ± 0.0 (3) (+2.0)", "44.6 ± 0.1 (3) (+1.4)"]
    assert found["imagenet - random"] == ["+3.0", "-1.0"]


def test_the_control_stands_below_its_row_and_says_what_equal_images_bring(fraction):
    found = lines(fraction)
    names = list(found)
    assert names.index("random, control of as many images") == names.index("random + self-training") + 1
    assert found["random, control of as many images"] == [
        "35.0 ± 0.5 (3) (student +0.0 ~)",
        "45.2 ± 0.2 (3) (student -0.8)",
    ]
    assert "imagenet, control of as many images" not in found


def test_the_papers_numbers_stand_beside_the_same_cells(fraction):
    found = lines(fraction)
    assert found["*paper: random*"] == ["*30.7*", "*44.3*"]
    assert found["*paper: random + self-training*"] == ["*34.1 (+3.4)*", "*45.6 (+1.3)*"]
    assert found["*paper: imagenet*"] == ["*33.3*", "*43.3*"]
    assert found["*paper: imagenet + self-training*"] == ["*36.0 (+2.7)*", "*44.6 (+1.3)*"]


def test_table_two_compares_with_random_init_in_the_column():
    columns = [Column(name.upper(), name, 1.0) for name in ("s1", "s2", "s3", "s4")]
    values = [[(39,)] * 4, [(40,), (38.5,), (39,), (38,)], [(41,)] * 4]
    found = lines(filled("augment", (RANDOM, PRE, SELF), columns, values))
    assert found["random"] == ["39.0 (1)"] * 4
    assert found["imagenet"] == ["40.0 (1) (+1.0 ?)", "38.5 (1) (-0.5 ?)", "39.0 (1) (+0.0 ?)", "38.0 (1) (-1.0 ?)"]
    assert found["random + self-training"] == ["41.0 (1) (+2.0 ?)"] * 4
    assert found["*paper: imagenet*"] == ["*39.5 (+0.3)*", "*40.7 (-0.8)*", "*43.2 (-0.7)*", "*43.3 (-1.0)*"]
    assert found["*paper: random + self-training*"] == [
        "*40.9 (+1.7)*",
        "*43.0 (+1.5)*",
        "*45.4 (+1.5)*",
        "*45.6 (+1.3)*",
    ]


def test_table_four_has_resnet50s_numbers():
    rows = (RANDOM, PRE, Row("simclr"), Row("moco"), SELF)
    found = lines(filled("init", rows, [Column("S4", "s4", 1.0)], [[(40,)], [(41,)], [(42,)], [(43,)], [(44,)]]))
    assert found["moco"] == ["43.0 (1) (+3.0 ?)"]
    assert found["*paper: simclr*"] == ["*40.4 (-0.7)*"]
    assert found["*paper: random + self-training*"] == ["*41.9 (+0.8)*"]
    assert "*paper: moco*" not in found
    elsewhere = filled("init", rows, [Column("S1", "s1", 1.0)], [[(40,)], [(41,)], [(42,)], [(43,)], [(44,)]])
    assert "paper:" not in markdown(elsewhere).split("\n\n")[1]


def test_table_seven_compares_with_boxes_alone_and_no_self_training():
    columns = [Column("boxes alone", "s4", 0.2, joint=False), Column("jointly", "s4", 0.2)]
    values = [[(30,), (33,)], [(34,), (36,)], [(33,), (33.5,)], [(36,), (37,)]]
    found = lines(filled("joint", (RANDOM, SELF, PRE, BOTH), columns, values))
    assert found["random"] == ["30.0 (1)", "33.0 (1) (+3.0 ?)"]
    assert found["random + self-training"] == ["34.0 (1) (+4.0 ?)", "36.0 (1) (+6.0 ?)"]
    assert found["imagenet + self-training"] == ["36.0 (1) (+3.0 ?)", "37.0 (1) (+4.0 ?)"]
    assert found["*paper: random*"] == ["*30.7*", "*33.6 (+2.9)*"]
    assert found["*paper: random + self-training*"] == ["*34.1 (+3.4)*", "*35.1 (+4.4)*"]
    assert found["*paper: imagenet + self-training*"] == ["*36.0 (+2.7)*", "*36.6 (+3.3)*"]


def test_other_scores_than_ap_have_no_published_numbers_beside_them(fraction):
    fraction.metric = "mIoU"
    text = markdown(fraction)
    assert text.startswith("## grid=fraction, scenes: mIoU in %")
    assert "*paper" not in text


def test_marks_are_two_standard_errors_of_a_difference():
    # Standard errors of 1 / sqrt(3) each: two of the difference's are 1.633
    assert difference(cell(31.64, 32.64, 33.64), cell(30, 31, 32)) == "+1.6"
    assert difference(cell(31.62, 32.62, 33.62), cell(30, 31, 32)) == "+1.6 ~"
    assert difference(cell(20), cell(30, 31, 32)) == "-11.0 ?"


def test_the_table_can_be_read_at_several_step_counts(fraction):
    text = markdown(fraction)
    quarter, half = (text.split(f"## After about {share} of each cell's steps")[1] for share in ("25%", "50%"))
    assert "| random | 7.5 | 11.0 |" in quarter.split("##")[0]
    assert "| random | 15.0 | 22.0 |" in half
    assert "| random, control of as many images | 17.5 | 22.6 |" in half
    assert "control" not in quarter.split("##")[0]  # it has no look there
    looks = [[(10, 100, 0.1), (60, 100, 0.5), (100, 100, 0.6)], [(40, 100, 0.3), (100, 100, 0.8)]]
    assert along(looks, 0.5) == pytest.approx(0.4)
    assert along(looks, 1.0) == pytest.approx(0.7)
    assert along([], 0.5) is along([looks[0], [(100, 100, 0.6)]], 0.5) is None  # no look near it


def test_what_cells_were_made_of_is_said_and_what_is_missing_left_out(fraction):
    part = {"steps": 500, "images_seen": 8000}
    pseudo = {"boxes_per_image": 1.234, "labelled_boxes_per_image": 2.5, "threshold": 0.5, "images": 800, "empty": 0.25}
    about = {
        "labelled_images": 200,
        "supervised": part,
        "student": {**part, "images_seen": 16000},
        "control": {**part, "images_seen": 16000},
    }
    fraction.runs[SELF, TWENTY] = [about | {"pseudo": pseudo}]
    made = markdown(fraction).split("## What the cells were made of")[1].split("##")[0]
    assert "| random + self-training: images seen, student | 16000 |  |" in made
    assert "| random + self-training: pseudo-boxes an image | 1.23 |  |" in made
    assert "| random + self-training: images without a pseudo-box | 25% |  |" in made
    assert "precision" not in made


def test_a_cell_that_failed_says_so_and_the_others_stay():
    grid = filled("fraction", (RANDOM,), (TWENTY, ALL), [[(30,), (40,)]])
    grid.rows.append(SELF)
    assert lines(grid)["random + self-training"] == ["failed", "failed"]
    assert lines(grid)["random"] == ["30.0 (1)", "40.0 (1)"]


def test_the_csv_has_every_look(fraction):
    rows = list(csv.DictReader(io.StringIO(csv_text(fraction))))
    looks = [row for row in rows if row["setup"] == "imagenet" and row["column"] == "20%"]
    assert [(row["part"], row["step"], row["steps"]) for row in looks] == [
        ("supervised", str(step), "100") for step in (25, 50, 75, 100)
    ]
    assert float(looks[-1]["score"]) == pytest.approx(0.33)
    controls = [row for row in rows if row["part"] == "control" and row["column"] == "100%"]
    assert [float(row["score"]) for row in controls] == pytest.approx([0.225, 0.45, 0.226, 0.452, 0.227, 0.454])
    assert [(row["step"], row["steps"]) for row in controls[:2]] == [("100", "200"), ("200", "200")]


def test_the_figure_has_a_line_for_every_row_and_control(fraction, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("sslzoo.report.grid.save", lambda shown, path: drawn.append(shown) or path)
    figure(fraction, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    named = axes.get_legend_handles_labels()[1]
    assert sorted(named) == sorted([row.name for row in fraction.rows] + ["random, control"])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["20%", "100%"]
