"""Average precision: COCO's numbers are pycocotools', VOC's those of a slow loop over detections."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from boxed import random_predictions, random_truth, write_coco
from sslzoo.data.boxes import load_boxes
from sslzoo.downstream.average_precision import BOXES, KEYPOINTS, coco_scores, voc_scores, write_results
from sslzoo.errors import UserError


def official(truth, results, iou="bbox", sigmas=None):
    """pycocotools on the set's own dictionaries and a results file."""
    image = np.repeat(np.arange(len(truth)), np.diff(truth.starts))
    shapes = truth.segmentations or [[]] * len(image)
    points = truth.keypoints if truth.keypoints is not None else np.zeros((len(image), 0, 3))
    coco = COCO()
    coco.dataset = {
        "images": [{"id": k, "height": int(h), "width": int(w)} for k, (h, w) in
                   zip(truth.image_ids, truth.sizes, strict=True)],
        "categories": [{"id": k, "name": str(k)} for k in truth.category_ids],
        "annotations": [
            {"id": k + 1, "image_id": truth.image_ids[i], "category_id": truth.category_ids[truth.labels[k] - 1],
             "bbox": truth.xywh[k].tolist(), "area": float(truth.areas[k]), "iscrowd": int(truth.crowd[k]),
             "segmentation": shapes[k], "keypoints": points[k].ravel().tolist(),
             "num_keypoints": int((points[k, :, 2] > 0).sum())}
            for k, i in enumerate(image)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        found = json.loads(results.read_text())
        if not found:
            found_coco = COCO()
            found_coco.dataset = {**coco.dataset, "annotations": []}
            found_coco.createIndex()
        else:
            found_coco = coco.loadRes(found)
        evaluator = COCOeval(coco, found_coco, iou)
        if sigmas is not None:
            evaluator.params.kpt_oks_sigmas = np.array(sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


CASES = {
    "crowds, empty images, ties": {},
    "one class": {"classes": 1},
    "no crowds": {"crowds": 0.0},
    "large objects": {"side": 400},
    "many detections": {"per_image": 130, "images": 5},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_box_scores_are_those_of_pycocotools(tmp_path, capsys, name, seed):
    rng, options = np.random.default_rng(seed), dict(CASES[name])
    per_image = options.pop("per_image", 9)
    truth = random_truth(rng, **options)
    predictions = random_predictions(rng, truth, per_image)
    ours = coco_scores(truth, predictions)
    theirs = official(truth, write_results(tmp_path / "results.json", truth, predictions))
    assert tuple(ours) == BOXES
    np.testing.assert_allclose(list(ours.values()), theirs, atol=1e-6)
    assert ours["map"] > 0.01
    assert capsys.readouterr() == ("", "")


def test_mask_scores_are_those_of_pycocotools(tmp_path):
    rng = np.random.default_rng(2)
    truth = random_truth(rng, masks=True)
    predictions = random_predictions(rng, truth)
    ours = coco_scores(truth, predictions, "segm")
    theirs = official(truth, write_results(tmp_path / "results.json", truth, predictions, "segm"), "segm")
    np.testing.assert_allclose(list(ours.values()), theirs, atol=1e-6)
    assert ours["map"] > 0.01
    soft = [{**found, "masks": found["masks"][:, None] * 0.8} for found in predictions]  # as Mask R-CNN gives them
    assert coco_scores(truth, soft, "segm") == ours


@pytest.mark.parametrize("count", [4, 17])
def test_keypoint_scores_are_those_of_pycocotools(tmp_path, count):
    rng = np.random.default_rng(3)
    truth = random_truth(rng, classes=2, points=count, side=300)
    predictions = random_predictions(rng, truth)
    ours = coco_scores(truth, predictions, "keypoints")
    results = write_results(tmp_path / "results.json", truth, predictions, "keypoints")
    theirs = official(truth, results, "keypoints", None if count == 17 else [0.05] * count)
    assert tuple(ours) == KEYPOINTS
    np.testing.assert_allclose(list(ours.values()), theirs, atol=1e-6)
    assert ours["map"] > 0.01


def nothing(truth):
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    return [none] * len(truth)


def test_no_detections_at_all_score_0_and_no_objects_score_minus_1(tmp_path):
    rng = np.random.default_rng(4)
    truth = random_truth(rng)
    ours = coco_scores(truth, nothing(truth), per_class=True)
    theirs = official(truth, write_results(tmp_path / "results.json", truth, nothing(truth)))
    np.testing.assert_allclose([ours[name] for name in BOXES], theirs, atol=1e-6)
    assert ours["map"] == 0
    assert ours["classes"]["class 2"] == -1  # a class without objects
    empty = truth.unlabelled()
    assert set(coco_scores(empty, random_predictions(rng, empty)).values()) == {-1.0}
    assert voc_scores(empty, random_predictions(rng, empty))["map"] == -1
    assert voc_scores(truth, nothing(truth))["map"] == 0


def test_the_mean_over_classes_is_map():
    rng = np.random.default_rng(5)
    truth = random_truth(rng, classes=4)
    scores = coco_scores(truth, random_predictions(rng, truth), per_class=True)
    occurring = [value for value in scores["classes"].values() if value > -1]
    assert len(occurring) == 3
    assert scores["map"] == pytest.approx(np.mean(occurring))


def test_the_truth_as_prediction_scores_1(tmp_path):
    truth, _ = load_boxes("coco", write_coco(tmp_path), masks=True)
    predictions = []
    for i in range(len(truth)):
        target = truth.target(i, with_masks=True)
        predictions.append({**target, "scores": torch.ones(len(target["boxes"]))})
    assert coco_scores(truth, predictions)["map"] == pytest.approx(1)
    assert coco_scores(truth, predictions, "segm")["map"] == pytest.approx(1)
    assert voc_scores(truth, predictions)["map"] == pytest.approx(1)
    with pytest.raises(UserError, match="no keypoints to score"):
        coco_scores(truth, [{**one, "keypoints": torch.zeros(len(one["boxes"]), 0, 3)} for one in predictions],
                    "keypoints")  # fmt: skip


def test_results_have_the_ids_of_the_annotation_file(tmp_path):
    truth, _ = load_boxes("coco", write_coco(tmp_path))
    predictions = nothing(truth)
    predictions[2] = {"boxes": torch.tensor([[1.0, 2, 4, 8]]), "scores": torch.tensor([0.5]),
                      "labels": torch.tensor([3])}  # fmt: skip
    file = write_results(tmp_path / "results.json", truth, predictions)
    assert json.loads(file.read_text()) == [
        {"image_id": 285, "category_id": 90, "score": 0.5, "bbox": [1.0, 2.0, 3.0, 6.0]}
    ]


def test_wrong_calls_are_refused():
    truth = random_truth(np.random.default_rng(0))
    with pytest.raises(ValueError, match="0 predictions for 12 images"):
        coco_scores(truth, [])
    with pytest.raises(ValueError, match="0 predictions for 12 images"):
        voc_scores(truth, [])
    with pytest.raises(UserError, match="iou=giou"):
        coco_scores(truth, nothing(truth), "giou")
    with pytest.raises(UserError, match="metric=12point"):
        voc_scores(truth, nothing(truth), "12point")


# ---- PASCAL VOC ----


def slow(truth, predictions, threshold, metric):
    """PASCAL's devkit, detection by detection, its pixels inclusive: 1-based corners and IoU with + 1."""
    found = []
    for label in range(1, len(truth.classes) + 1):
        targets = [truth.target(i) for i in range(len(truth))]
        rows = [
            (-float(score), i, k)
            for i, one in enumerate(predictions)
            for k, score in enumerate(one["scores"])
            if one["labels"][k] == label
        ]
        taken, right, wrong = set(), [], []
        objects = sum(int(((t["labels"] == label) & ~t["difficult"] & ~t["iscrowd"]).sum()) for t in targets)
        if not objects:
            continue
        for _, i, k in sorted(rows, key=lambda row: row[0]):  # stable
            x1, y1, x2, y2 = (float(v) for v in predictions[i]["boxes"][k])
            x1, y1 = x1 + 1, y1 + 1
            best, best_iou = None, -np.inf
            for j, (u1, v1, u2, v2) in enumerate(truth.xywh[truth.rows(i)].tolist()):
                if targets[i]["labels"][j] != label:
                    continue
                u2, v2, u1, v1 = u1 + u2, v1 + v2, u1 + 1, v1 + 1
                w, h = min(x2, u2) - max(x1, u1) + 1, min(y2, v2) - max(y1, v1) + 1
                shared = max(w, 0) * max(h, 0)
                iou = shared / ((x2 - x1 + 1) * (y2 - y1 + 1) + (u2 - u1 + 1) * (v2 - v1 + 1) - shared)
                if iou > best_iou:
                    best, best_iou = j, iou
            if best_iou > threshold:
                if targets[i]["difficult"][best] or targets[i]["iscrowd"][best]:
                    right.append(0), wrong.append(0)
                    continue
                right.append(int((i, best) not in taken)), wrong.append(int((i, best) in taken))
                taken.add((i, best))
            else:
                right.append(0), wrong.append(1)
        hits, misses = np.cumsum(right), np.cumsum(wrong)
        recall, precision = hits / objects, hits / np.maximum(hits + misses, np.finfo(float).eps)
        if metric == "11point":
            steps = [precision[recall >= t].max() if (recall >= t).any() else 0 for t in np.arange(0, 1.1, 0.1)]
            found.append(sum(steps) / 11)
        else:
            recall, precision = np.r_[0, recall, 1], np.r_[0, precision, 0]
            for k in range(len(precision) - 1, 0, -1):
                precision[k - 1] = max(precision[k - 1], precision[k])
            found.append(sum((recall[k + 1] - recall[k]) * precision[k + 1] for k in range(len(recall) - 1)))
    return float(np.mean(found))


@pytest.mark.parametrize("metric", ["area", "11point"])
@pytest.mark.parametrize("seed", range(4))
def test_voc_scores_are_those_of_the_devkits_loop(metric, seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=8, classes=3, difficult=0.3, crowds=0.0 if seed % 2 else 0.1)
    predictions = random_predictions(rng, truth)
    scores = voc_scores(truth, predictions, metric)
    assert scores["map_50"] == pytest.approx(slow(truth, predictions, 0.5, metric), abs=1e-9)
    assert scores["map_75"] == pytest.approx(slow(truth, predictions, 0.75, metric), abs=1e-9)
    assert scores["map_50"] > 0.05
    several = [slow(truth, predictions, t, metric) for t in np.linspace(0.5, 0.95, 10)] if seed == 0 else None
    if several:
        assert scores["map"] == pytest.approx(np.mean(several), abs=1e-9)


def test_the_11_points_and_the_area_differ_as_they_should():
    """One object found first, the second after a miss: precision 1 up to recall 1/2, 2/3 from there."""
    truth = random_truth(np.random.default_rng(0), images=1, classes=1, most=1)
    truth.starts = np.array([0, 2])
    truth.xywh = np.array([[0, 0, 10, 10], [50, 50, 10, 10.0]])
    truth.labels, truth.areas = np.array([1, 1]), np.array([100.0, 100])
    truth.crowd = truth.difficult = np.zeros(2, bool)
    boxes = torch.tensor([[0, 0, 10, 10], [80, 80, 90, 90], [50, 50, 60, 60.0]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.ones(3, dtype=torch.long)}]
    assert voc_scores(truth, found)["map_50"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert voc_scores(truth, found, "11point")["map_50"] == pytest.approx((6 + 5 * 2 / 3) / 11)
