"""Pseudo-labels: written and read again, and judged by labels held back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from boxed import random_predictions, random_truth, write_coco
from sslzoo.data.boxes import held_back, load_boxes, load_unlabelled
from sslzoo.data.pseudo_labels import PseudoLabels, quality
from sslzoo.errors import UserError
from sslzoo.selftrain import select


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path / "set")


def a_box_each(images, scores=(0.9, 0.6, 0.7)) -> list[dict]:
    return [
        {"boxes": torch.tensor([[1.0, 2, 11, 12.5]]), "scores": torch.tensor([score]), "labels": torch.tensor([3])}
        for score, _ in zip(scores, images.files, strict=True)
    ]


def test_they_are_written_with_scores_and_the_sets_own_ids_and_read_again(root, tmp_path):
    train, _ = load_boxes("coco", root)
    pseudo = select(train.unlabelled(), a_box_each(train), 0.65)
    content = json.loads(pseudo.write(tmp_path / "labels.json").read_text())
    assert [image["id"] for image in content["images"]] == train.image_ids
    assert {category["id"]: category["name"] for category in content["categories"]} == dict(
        zip(train.category_ids, train.classes, strict=True)
    )
    ids = [annotation["image_id"] for annotation in content["annotations"]]
    assert ids == [train.image_ids[0], train.image_ids[2]]
    assert {annotation["category_id"] for annotation in content["annotations"]} == {train.category_ids[2]}
    assert [annotation["score"] for annotation in content["annotations"]] == pytest.approx([0.9, 0.7])
    again = PseudoLabels.read(tmp_path / "labels.json", train)
    assert again.images.files == [Path(file).absolute() for file in train.files]
    for name in ("xywh", "labels", "areas", "starts", "sizes"):
        np.testing.assert_array_equal(getattr(again.images, name), getattr(pseudo.images, name))
    np.testing.assert_array_equal(again.scores, pseudo.scores)
    assert again.threshold == pseudo.threshold == 0.65
    assert again.images.classes == train.classes
    picture, target = again.with_boxes().read(1)
    assert picture.shape[:2] == tuple(train.sizes[2])
    assert target["boxes"].tolist() == [[1, 2, 11, 12.5]]


def test_masks_go_along(tmp_path, root):
    train, _ = load_boxes("coco", root, masks=True)
    found = a_box_each(train)
    for each, (height, width) in zip(found, train.sizes.tolist(), strict=True):
        each["masks"] = [{"size": [height, width], "counts": [height * width - 20, 20]}]
    pseudo = select(train.unlabelled(), found, 0.65)
    pseudo.write(tmp_path / "labels.json")
    again = PseudoLabels.read(tmp_path / "labels.json", train, masks=True)
    masks = again.images.target(0, with_masks=True)["masks"]
    assert masks.shape == (1, *train.sizes[0])
    assert masks.sum() == 20


@pytest.mark.parametrize("content", ["{}", '{"info": {}, "annotations": [{"id": 1}]}', "no json"])
def test_other_files_are_refused(tmp_path, root, content):
    train, _ = load_boxes("coco", root)
    with pytest.raises(UserError, match="are no file"):
        PseudoLabels.read(tmp_path / "none.json", train)
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(UserError, match="holds no pseudo-labels"):
        PseudoLabels.read(tmp_path / "labels.json", train)


# Judged


def slow_quality(pseudo, truth, iou=0.5) -> tuple[float, float]:
    """Precision and recall by nested loops over plain numbers."""
    right = wrong = objects = 0
    for i, name in enumerate(pseudo.images.image_ids):
        true = truth.target(truth.image_ids.index(name))
        boxes, labels, crowds = true["boxes"].double().tolist(), true["labels"].tolist(), true["iscrowd"].tolist()
        objects += crowds.count(False)
        rows = range(*pseudo.images.rows(i).indices(len(pseudo.scores)))
        target = pseudo.images.target(i)
        own, named = target["boxes"].double().tolist(), target["labels"].tolist()
        taken = set()
        for k in sorted(range(len(rows)), key=lambda k: -pseudo.scores[rows[k]]):
            best, best_overlap, in_crowd = None, iou, False
            for j, (box, label, crowd) in enumerate(zip(boxes, labels, crowds, strict=True)):
                if label != named[k]:
                    continue
                a, b = own[k], box
                width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                shared = max(width, 0) * max(height, 0)
                area, other = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
                overlap = shared / (area if crowd else area + other - shared)
                if crowd:
                    in_crowd |= overlap >= iou
                elif j not in taken and overlap >= best_overlap and (best is None or overlap > best_overlap):
                    best, best_overlap = j, overlap
            if best is not None:
                taken.add(best)
                right += 1
            elif not in_crowd:
                wrong += 1
    return right / max(1, right + wrong), right / objects


@pytest.mark.parametrize("seed", range(6))
def test_precision_and_recall_are_those_of_a_slow_count(seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=20, classes=2)
    pseudo = select(truth.unlabelled(), random_predictions(rng, truth), 0.3)
    found = quality(pseudo, [truth])
    assert (found["precision"], found["recall"]) == pytest.approx(slow_quality(pseudo, truth))
    assert 0 < found["recall"] < 1
    assert found["judged_images"] == 20


def test_images_without_known_labels_are_not_judged():
    truth = random_truth(np.random.default_rng(0), images=8, crowds=0)
    right = [{**truth.target(i), "scores": torch.ones(len(truth.target(i)["labels"]))} for i in range(8)]
    pseudo = select(truth.unlabelled(), right, 0.5, smallest=0)
    assert quality(pseudo, []) == {}
    halves = [truth.subset(np.arange(3)), truth.subset(np.arange(3, 5))]
    found = quality(pseudo, halves)
    assert (found["precision"], found["recall"], found["judged_images"]) == (1.0, 1.0, 5)


def test_labels_held_back_are_those_of_the_images_to_label(root):
    for fraction in (0.34, 1.0):
        train, _ = load_boxes("coco", root, label_fraction=fraction)
        parts = held_back("coco", root, label_fraction=fraction)
        if fraction == 1.0:
            assert parts == []
            continue
        pool = load_unlabelled("coco", root, label_fraction=fraction)
        assert [name for part in parts for name in part.image_ids] == pool.image_ids
        assert not set(pool.image_ids) & set(train.image_ids)
        assert sum(len(part.labels) for part in parts) > 0
        assert len(pool.labels) == 0
