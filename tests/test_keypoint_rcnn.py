"""Keypoint R-CNN: its losses by slow formulas, points of all ranks, where points lie, one step of training."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from boxed import random_predictions, random_truth
from conftest import on_ranks
from sslzoo.blocks import Encoder
from sslzoo.data.box_set import BoxSet
from sslzoo.dist import all_mean
from sslzoo.downstream.average_precision import coco_scores
from sslzoo.downstream.keypoint_rcnn import BETA, box_losses, build, keypoint_loss
from sslzoo.errors import UserError

MEAN, STD = [0.5] * 3, [0.25] * 3
SMALL = {"channels": 16, "convs": 1, "norm": "group", "rois": 8, "proposals": 10}


def detector(**options) -> nn.Module:
    encoder = Encoder("resnet10t", width=0.125)
    return build(encoder, 3, MEAN, STD, **{"min_size": 64, "max_size": 64, **SMALL, **options})


def regions(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heat maps ``(count, 3, 8, 8)``, regions, and points of which some are missing and some outside."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.double)
    corner = 20 * torch.rand(count, 2, generator=generator).double()
    boxes = torch.cat([corner, corner + 8 + 20 * torch.rand(count, 2, generator=generator).double()], 1)
    places = corner[:, None] + 30 * torch.rand(count, 3, 2, generator=generator).double()
    labelled = torch.randint(0, 3, (count, 3, 1), generator=generator).double()
    return maps, boxes, torch.cat([places, labelled], 2)


def slow_keypoint_loss(maps, boxes, points) -> tuple[float, int]:
    """Sum of cross entropies and how many, a point at a time."""
    total, count = 0.0, 0
    for own, (x1, y1, x2, y2), pointed in zip(maps.tolist(), boxes.tolist(), points.tolist(), strict=True):
        for rows, (x, y, labelled) in zip(own, pointed, strict=True):
            column, row = math.floor((x - x1) * 8 / (x2 - x1)), math.floor((y - y1) * 8 / (y2 - y1))
            if labelled == 0 or not (0 <= column < 8 and 0 <= row < 8):
                continue
            total += math.log(sum(math.exp(value) for line in rows for value in line)) - rows[row][column]
            count += 1
    return total, count


def test_the_keypoint_loss_is_the_mean_cross_entropy_of_labelled_points_in_their_region():
    maps, boxes, points = regions(12)
    total, count = slow_keypoint_loss(maps, boxes, points)
    assert 5 < count < 30
    assert keypoint_loss(maps, boxes, points).item() == pytest.approx(total / count, rel=1e-9)


def test_missing_points_give_no_gradient_and_a_batch_without_any_a_loss_of_zero():
    maps, boxes, points = regions(6)
    maps.requires_grad_()
    points[0, :, 2] = 0
    keypoint_loss(maps, boxes, points).backward()
    assert (maps.grad[0] == 0).all()
    assert maps.grad.abs().sum() > 0
    for none in (points * 0, points[:0]):
        few = maps[: len(none)].detach().requires_grad_()
        loss = keypoint_loss(few, boxes[: len(none)], none)
        loss.backward()
        assert loss.item() == 0
        assert (few.grad == 0).all()


def _half(rank: int) -> tuple[float, torch.Tensor]:
    maps, boxes, points = regions(12)
    points[:6, :2, 2] = 0  # few points on the first rank
    mine = slice(6 * rank, 6 * rank + 6)
    own = maps[mine].clone().requires_grad_()
    loss = keypoint_loss(own, boxes[mine], points[mine])
    loss.backward()
    return all_mean(loss).item(), own.grad / 2  # DDP's mean


def test_two_ranks_have_the_loss_and_gradient_of_one():
    maps, boxes, points = regions(12)
    points[:6, :2, 2] = 0
    maps.requires_grad_()
    loss = keypoint_loss(maps, boxes, points)
    loss.backward()
    (one, first), (other, second) = on_ranks(2, _half)
    assert one == other == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([first, second]), maps.grad, rtol=1e-12, atol=1e-15)


def test_box_losses_are_cross_entropy_and_smooth_l1_with_beta_a_half():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 2, generator=generator).double()
    deltas = torch.randn(10, 8, generator=generator).double()
    wanted = torch.randn(10, 4, generator=generator).double()
    labels = torch.tensor([0, 1] * 5)
    classification, regression = box_losses(logits, deltas, labels, wanted)
    assert classification.item() == pytest.approx(F.cross_entropy(logits, labels).item())
    total = 0.0
    for row in range(1, 10, 2):
        for k in range(4):
            distance = abs(deltas[row, 4 + k].item() - wanted[row, k].item())
            total += 0.5 * distance**2 / BETA if distance < BETA else distance - 0.5 * BETA
    assert regression.item() == pytest.approx(total / 10)


def target(points: list, boxes: list) -> dict:
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.ones(len(boxes), dtype=torch.long),
        "keypoints": torch.tensor(points).view(-1, 3, 3),
    }


def test_every_weight_learns_and_images_without_objects_or_points_are_no_trouble():
    wanted = [
        target([[[20.0, 20, 2], [30, 30, 1], [0, 0, 0]]], [[10.0, 10, 50, 50]]),
        target([[[0.0, 0, 0]] * 3], [[10.0, 10, 50, 50]]),
        target([], []),
    ]
    net = detector().train()
    losses = net([torch.rand(3, 64, 64) for _ in wanted], wanted)
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_keypoint"}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} <= {"backbone.encoder.net.fc.weight"}
    net.zero_grad()
    none = [target([[[0.0, 0, 0]] * 3], [[10.0, 10, 50, 50]])] * 2
    losses = net([torch.rand(3, 64, 64)] * 2, none)
    assert losses["loss_keypoint"].item() == 0


@pytest.mark.slow
def test_it_finds_the_points_it_has_learned_to_the_pixel():
    torch.manual_seed(0)
    images, wanted = [], []
    for x, y in ((8, 10), (20, 24), (28, 6), (12, 30)):
        image = torch.full((3, 64, 64), 0.4)
        image[:, y : y + 28, x : x + 28] = 0.1
        points = [[x + 4.0, y + 4.0, 2], [x + 23.0, y + 4.0, 2], [x + 13.0, y + 22.0, 2]]
        for k, (a, b, _) in enumerate(points):
            image[k, int(b) - 1 : int(b) + 2, int(a) - 1 : int(a) + 2] = 1
        images.append(image)
        wanted.append(target([points], [[float(x), y, x + 28.0, y + 28.0]]))
    net = detector(channels=32).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(net(images, wanted).values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
    found = net.eval()(images)
    pairs = zip(found, wanted, strict=True)
    errors = torch.cat([each["keypoints"][0, :, :2] - one["keypoints"][0, :, :2] for each, one in pairs])
    assert errors.median(0).values.abs().max() < 0.75  # no shift to one side
    assert errors.norm(dim=1).median() < 1.5


def test_twice_as_many_regions_settings_and_mistakes():
    net = detector()
    assert net.rpn.post_nms_top_n() == 15
    net.eval()
    assert net.rpn.post_nms_top_n() == 10
    with pytest.raises(UserError, match=r"task\.norm=layer is none of none, group, batch"):
        detector(norm="layer")
    with pytest.raises(UserError, match=r"task\.max_size=32 is less than task\.min_size=64"):
        detector(max_size=32)


def slow_oks_ap(truth: BoxSet, found: list[dict], spread: float = 0.05) -> float:
    """COCO's AP of keypoints of one class by its definition, object by object, without crowds."""
    entries, objects = [], 0
    oks = {}
    for i, each in enumerate(found):
        rows = [r for r in range(truth.starts[i], truth.starts[i + 1]) if (truth.keypoints[r, :, 2] > 0).any()]
        objects += len(rows)
        order = sorted(range(len(each["scores"])), key=lambda k, each=each: -each["scores"][k].item())[:20]
        for k in order:
            entries.append((each["scores"][k].item(), i, k))
            for r in rows:
                terms = []
                for (a, b, labelled), (x, y, _) in zip(
                    truth.keypoints[r].astype(float).tolist(), each["keypoints"][k].double().tolist(), strict=True
                ):
                    if labelled:
                        squared = (x - a) ** 2 + (y - b) ** 2
                        terms.append(math.exp(-squared / (2 * truth.areas[r] * (2 * spread) ** 2)))
                oks[i, k, r] = sum(terms) / len(terms)
    number = sorted(range(len(truth)), key=truth.image_ids.__getitem__)
    place = {i: n for n, i in enumerate(number)}
    entries.sort(key=lambda entry: (-entry[0], place[entry[1]]))
    precisions = []
    for threshold in np.linspace(0.5, 0.95, 10):
        taken, hits = set(), []
        for _, i, k in entries:
            best, at = min(threshold, 1 - 1e-10), None
            for r in range(truth.starts[i], truth.starts[i + 1]):
                if (i, k, r) in oks and r not in taken and oks[i, k, r] >= best:
                    best, at = oks[i, k, r], r
            hits.append(at is not None)
            taken |= {at} - {None}
        right = np.cumsum(hits)
        precision = right / np.arange(1, len(hits) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right / objects, np.linspace(0, 1, 101))
        precisions.append(np.append(envelope, 0)[at].mean())
    return float(np.mean(precisions))


@pytest.mark.parametrize("seed", range(3))
def test_oks_ap_is_that_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=15, classes=1, crowds=0.0, points=4)
    truth.keypoints[:, 0, 2] = 2  # each object has a point: COCO sets others aside
    found = random_predictions(rng, truth)
    for each in found:  # no ties: COCO breaks them in an order of its own
        each["scores"] = torch.from_numpy(
            rng.permutation(len(each["scores"])) / 10 + rng.random(len(each["scores"])) / 11
        )
    wanted = slow_oks_ap(truth, found)
    assert 0.02 < wanted < 0.98
    assert coco_scores(truth, found, iou="keypoints")["map"] == pytest.approx(wanted, abs=1e-6)
