"""Soft-NMS against the paper's loop, one class and one box at a time in float64."""

import math

import pytest
import torch

from sslzoo.downstream.suppression import Suppression, soft_nms


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def slow(boxes, scores, labels, sigma: float, score: float, limit: int) -> list[tuple[int, float]]:
    """Bodla et al. 2017, figure 2: take the best, lower the others of its class."""
    left = {i: float(value) for i, value in enumerate(scores)}
    done = []
    while left:
        best = max(left, key=lambda i: left[i])
        value = left.pop(best)
        if value >= score:
            done.append((best, value))
        for other in left:
            if labels[other] == labels[best]:
                left[other] *= math.exp(-(overlap(boxes[best], boxes[other]) ** 2) / sigma)
    return sorted(done, key=lambda pair: -pair[1])[:limit]


def crowd(n: int, classes: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(n, 2, generator=generator, dtype=torch.double)
    side = 5 + 25 * torch.rand(n, 2, generator=generator, dtype=torch.double)
    scores = torch.rand(n, generator=generator, dtype=torch.double)
    labels = torch.randint(1, classes + 1, (n,), generator=generator)
    return torch.cat([corner, corner + side], 1), scores, labels


@pytest.mark.parametrize(("n", "classes"), [(1, 1), (40, 1), (60, 4), (60, 60)])
@pytest.mark.parametrize(("sigma", "score", "limit"), [(0.3, 0.05, 100), (0.5, 0.3, 100), (0.3, 0.0, 7)])
def test_soft_nms_is_the_papers_loop(n, classes, sigma, score, limit):
    boxes, scores, labels = crowd(n, classes)
    kept, lowered = soft_nms(boxes, scores, labels, sigma, score, limit)
    expected = slow(boxes.tolist(), scores.tolist(), labels.tolist(), sigma, score, limit)
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(lowered, torch.tensor([value for _, value in expected], dtype=torch.double))


def test_boxes_of_other_classes_are_left_alone_and_copies_are_lowered():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 2])
    kept, lowered = soft_nms(boxes, scores, labels, sigma=0.3, score=0.01)
    assert kept.tolist() == [0, 2, 1]
    torch.testing.assert_close(lowered, torch.tensor([0.9, 0.7, 0.8 * math.exp(-1 / 0.3)]))


def test_a_box_without_area_overlaps_nothing_and_no_boxes_stay_none():
    boxes, labels = torch.tensor([[5.0, 5, 5, 5], [5.0, 5, 5, 5]]), torch.tensor([1, 1])
    _, lowered = soft_nms(boxes, torch.tensor([0.9, 0.8]), labels)
    assert torch.equal(lowered, torch.tensor([0.9, 0.8]))
    kept, lowered = soft_nms(boxes[:0], torch.zeros(0), labels[:0])
    assert kept.shape == lowered.shape == (0,)


def test_every_score_below_the_threshold_leaves_nothing():
    boxes, scores, labels = crowd(5, 2)
    kept, lowered = soft_nms(boxes, scores / 100, labels, score=0.05)
    assert kept.shape == lowered.shape == (0,)


def test_hard_suppression_is_left_to_torchvision():
    boxes, scores, labels = crowd(8, 2)
    assert all(a is b for a, b in zip(Suppression()(boxes, scores, labels), (boxes, scores, labels), strict=True))
    assert Suppression(iou=0.6, limit=50).torchvisions == {
        "score_thresh": 0.05,
        "nms_thresh": 0.6,
        "detections_per_img": 50,
    }


def test_no_box_is_returned_twice_though_scores_vanish():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(61, 1)
    labels = torch.tensor([1] * 60 + [2])
    kept, lowered = soft_nms(boxes, torch.full((61,), 0.9), labels, score=0.0)
    assert sorted(kept.tolist()) == list(range(61))
    assert (lowered.diff() <= 0).all()
