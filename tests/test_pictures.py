"""Pictures: valid files whose ink is that of the data."""

import numpy as np
import pytest
from PIL import Image

from runs import image_set
from sslzoo.report import pictures
from sslzoo.report.pictures import BLUE, GREEN, INK, ORANGE, RED, curves, neighbour_strips

ROWS = [{"step": step, "loss": 1 / step, "images_per_second": 100.0 + step} for step in range(1, 9)]
KNN = [{"step": step, "knn_top1": step / 10} for step in (4, 8)]


def pixels_of(path, colour: str) -> int:
    """How many pixels have this colour, or it mixed with white as thin lines do; first checks that the PNG is whole."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        picture.load()
        assert min(picture.size) > 40
        ink = 255.0 - np.asarray(picture.convert("RGB")).reshape(-1, 3)
    wanted = 255.0 - np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    share = ink @ wanted / (wanted @ wanted)
    return int(((share > 0.5) & (np.linalg.norm(ink - share[:, None] * wanted, axis=1) < 12)).sum())


def test_curves_show_loss_speed_knn_and_both_baselines(tmp_path):
    path = curves(ROWS + KNN, tmp_path / "curves.png", "moco on noise", raw=0.3, random_init=0.2)
    for colour in (BLUE, GREEN, ORANGE, INK):
        assert pixels_of(path, colour) > 50, colour
    with Image.open(path) as picture:
        assert picture.width > 2.5 * picture.height


def test_a_run_without_knn_still_has_its_loss_and_speed(tmp_path):
    path = curves(ROWS, tmp_path / "curves.png", "unlabelled", raw=None, random_init=None)
    assert pixels_of(path, BLUE) > 100
    assert pixels_of(path, GREEN) > 100
    assert pixels_of(path, ORANGE) == 0


def test_a_run_that_logged_nothing_has_empty_axes(tmp_path):
    path = curves([], tmp_path / "curves.png", "short", raw=None, random_init=None)
    assert [pixels_of(path, colour) for colour in (BLUE, GREEN, ORANGE)] == [0] * 3
    with Image.open(path) as picture:
        assert len(picture.convert("L").getcolors()) > 10  # axes and titles


def plotted(draw, *arguments):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw(axes, *arguments)
    return axes, [line.get_xydata().tolist() for line in axes.get_lines()]


def test_lines_go_through_what_was_logged():
    axes, (line,) = plotted(pictures.draw_loss, KNN + ROWS)
    assert line == [[step, 1 / step] for step in range(1, 9)]
    axes, (line,) = plotted(pictures.draw_speed, ROWS)
    assert line == [[step, 100 + step] for step in range(1, 9)]
    assert axes.get_ylim()[0] == 0
    axes, lines = plotted(pictures.draw_knn, ROWS + KNN, 0.3, 0.2)
    assert lines[0] == [[4, 40], [8, 80]]
    assert [[y for _, y in line] for line in lines[1:]] == [[20, 20], [30, 30]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pretrained", "random init", "raw pixels"]


def strips(tmp_path, queries_of, bank_of, count=4, k=3, rows=6, gray=True):
    """Neighbours among images of the given classes, where every feature is its class."""
    train, val = image_set(30), image_set(12, seed=1)
    if gray:  # so that all colour is that of the frames
        train.images[:], val.images[:] = 128, 128
    bank_rows = np.array([row for row in range(30) if train.labels[row] in bank_of])
    query_rows = np.array([row for row in range(12) if val.labels[row] in queries_of])[:rows]
    one_hot = np.eye(4, dtype=np.float32)
    features = one_hot[val.labels[query_rows]], one_hot[train.labels[bank_rows]]
    path = tmp_path / "neighbours.png"
    return neighbour_strips(path, (val, query_rows), (train, bank_rows), {"a": features}, count, k)


def test_neighbours_of_the_same_label_are_framed_green_and_others_red(tmp_path):
    path = strips(tmp_path, {0, 1}, {0, 1, 2})
    assert pixels_of(path, GREEN) > 100
    assert pixels_of(path, RED) == 0
    path = strips(tmp_path, {0, 1}, {2})
    assert pixels_of(path, RED) > 100
    assert pixels_of(path, GREEN) == 0


def test_strips_show_the_pictures_themselves(tmp_path):
    with Image.open(strips(tmp_path, {0}, {0}, count=2, gray=False)) as picture:
        shades = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    reddish = (shades[:, 0] > shades[:, 1:].max(1) + 40).mean()
    assert reddish > 0.2


def test_more_columns_make_a_wider_picture_and_more_queries_a_taller_one(tmp_path):
    train, val = image_set(30), image_set(12, seed=1)
    rng = np.random.default_rng(0)
    bank, queries = (rng.standard_normal((n, 4)).astype(np.float32) for n in (30, 12))
    sets = (val, np.arange(12)), (train, np.arange(30))
    sizes = []
    for columns, count in ((1, 2), (2, 2), (1, 8)):
        features = {str(c): (queries, bank) for c in range(columns)}
        with Image.open(neighbour_strips(tmp_path / "n.png", *sets, features, count)) as picture:
            sizes.append(picture.size)
    assert sizes[1][0] > 1.5 * sizes[0][0]
    assert sizes[2][1] > 2 * sizes[0][1]


@pytest.mark.parametrize(("count", "k"), [(50, 3), (2, 50)])
def test_fewer_images_than_asked_for_are_all_that_is_shown(tmp_path, count, k):
    assert pixels_of(strips(tmp_path, {0}, {0}, count, k), GREEN) > 100
