"""NME and PCK against loops over single points; which detection is an object's."""

import math

import numpy as np
import pytest
import torch

from boxed import random_predictions, random_truth
from pointed import write_corners
from sslzoo.data.point_sets import load_points
from sslzoo.downstream.point_scores import check_scores, matched, point_scores, score
from sslzoo.errors import UserError


def slow(found, points, unit, pck):
    """NME and PCK by definition, a point at a time."""
    distances, asked, right = [], 0, 0
    for own, true, size in zip(found.tolist(), points.tolist(), unit.tolist(), strict=True):
        for (x, y), (a, b, labelled) in zip(own, true, strict=True):
            if labelled == 0 or math.isnan(size):
                continue
            asked += 1
            if math.isnan(x):
                continue
            distance = math.sqrt((x - a) ** 2 + (y - b) ** 2) / size
            distances.append(distance)
            right += distance <= pck
    return sum(distances) / len(distances), right / asked, asked


@pytest.mark.parametrize("seed", range(5))
def test_nme_and_pck_are_those_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.uniform(0, 50, (30, 4, 2)), rng.integers(0, 3, (30, 4, 1))], axis=2)
    found = points[..., :2] + rng.normal(0, 4, (30, 4, 2))
    found[rng.random((30, 4)) < 0.1] = np.nan
    unit = rng.uniform(10, 60, 30)
    unit[rng.random(30) < 0.2] = np.nan
    points[points[..., 2] == 0] = np.nan  # what stands there must not matter
    points[..., 2] = np.nan_to_num(points[..., 2])
    scores = point_scores(found, points, unit, 0.1)
    nme, pck, asked = slow(found, points, unit, 0.1)
    assert scores["nme"] == pytest.approx(nme, rel=1e-12)
    assert scores["pck"] == pytest.approx(pck, rel=1e-12)
    assert scores["scored_points"] == asked
    assert 0 < pck < 1


def test_without_a_labelled_point_there_is_no_score_and_no_nan():
    points = np.zeros((3, 2, 3))
    assert point_scores(np.ones((3, 2, 2)), points, np.ones(3), 0.1) == {"scored_points": 0}
    points[..., 2] = 1
    assert point_scores(np.full((3, 2, 2), np.nan), points, np.ones(3), 0.1) == {"scored_points": 6, "pck": 0.0}


def test_a_set_is_scored_in_its_own_units(tmp_path):
    settings = {"name": "coco", "root": write_corners(tmp_path), "on_error": "raise", "label_fraction": 1.0}
    _, val = load_points(settings)
    off = torch.from_numpy(val.points[..., :2]) + torch.tensor([3.0, -4.0])
    labelled = (val.points[..., 2] > 0).sum(1)
    for kind in ("box", "image"):
        scores = score(val, off, kind, pck=5 / val.normalisers(kind).max() + 1e-6)
        wanted = (labelled * 5 / val.normalisers(kind)).sum() / labelled.sum()
        assert scores["nme"] == pytest.approx(wanted, rel=1e-6)
        assert scores["pck"] == pytest.approx(labelled[val.normalisers(kind).argmax()] / labelled.sum(), abs=0.5)
        assert scores["scored_points"] == labelled.sum()
    with pytest.raises(UserError, match=r"task\.pck=0 is no distance"):
        check_scores(val, "box", 0)
    with pytest.raises(UserError, match="needs eyes"):
        check_scores(val, "interocular", 0.1)
    blind = type(val)(**{**vars(val), "names": ["left_eye", "right_eye", "nose"], "points": val.points * 0})
    with pytest.raises(UserError, match="interocular is unknown of all"):
        check_scores(blind, "interocular", 0.1)


def iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / area


@pytest.mark.parametrize("seed", range(4))
def test_an_object_gets_the_points_of_the_box_that_overlaps_it_most(seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=15, classes=1, points=3)
    found = random_predictions(rng, truth)
    rows, places = matched(truth, found)
    wanted_rows, missed = [], 0
    for i, each in enumerate(found):
        for row in range(truth.starts[i], truth.starts[i + 1]):
            if truth.crowd[row] or not (truth.keypoints[row, :, 2] > 0).any():
                continue
            x, y, w, h = truth.xywh[row].tolist()
            overlaps = [iou((x, y, x + w, y + h), box) for box in each["boxes"].double().tolist()]
            wanted_rows.append(row)
            own = places[len(wanted_rows) - 1]
            if max(overlaps, default=0) < 0.5:
                missed += 1
                assert np.isnan(own).all()
            else:
                best = int(np.argmax(overlaps))
                assert own == pytest.approx(each["keypoints"][best, :, :2].double().numpy())
    assert rows.tolist() == wanted_rows
    assert 0 < missed < len(wanted_rows)
