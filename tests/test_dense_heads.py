"""One-stage detectors normalise their losses over the batch of all ranks, and count labels from one."""

import copy
import math

import pytest
import torch
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from conftest import close, on_ranks
from detecting import BOXES, ENCODERS, MEAN, SMALL, STD, images, targets
from sslzoo.downstream.dense_heads import RetinaNetHead, focal_loss
from sslzoo.downstream.detectors import build


def focal(logit: float, positive: bool) -> float:
    """Lin et al. 2017, eq. 5, with alpha = 0.25 and gamma = 2."""
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


def test_the_focal_loss_is_divided_by_the_batchs_positives():
    head = RetinaNetHead(8, 9, 3, 1, None)
    logits, deltas = torch.randn(3, 6, 3, dtype=torch.double), torch.randn(3, 6, 4, dtype=torch.double)
    anchors = [
        torch.tensor([[0.0, 0, 8, 8], [8, 0, 20, 9], [2, 3, 9, 9], [1, 1, 5, 7], [4, 4, 6, 8], [0, 0, 9, 9]])
    ] * 3
    found = [
        {"boxes": torch.tensor([[1.0, 1, 9, 9], [2, 2, 7, 8]]).double(), "labels": torch.tensor([2, 0])},
        {"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0, dtype=torch.long)},
        {"boxes": torch.tensor([[0.0, 0, 8, 9]]).double(), "labels": torch.tensor([1])},
    ]
    matched = [torch.tensor([0, -1, 1, -2, 1, -1]), torch.full((6,), -1), torch.tensor([-1, -1, -2, 0, -1, -1])]
    output = {"cls_logits": logits, "bbox_regression": deltas}
    losses = head.compute_loss(found, output, [a.double() for a in anchors], matched)
    classification = regression = 0.0
    for image, rows in enumerate(matched):
        for anchor, row in enumerate(rows.tolist()):
            if row == -2:
                continue
            label = found[image]["labels"][row].item() if row >= 0 else None
            classification += sum(focal(logits[image, anchor, c].item(), c == label) for c in range(3))
            if row >= 0:
                x1, y1, x2, y2 = found[image]["boxes"][row].tolist()
                a1, b1, a2, b2 = anchors[image][anchor].tolist()
                w, h = a2 - a1, b2 - b1
                wanted = ((x1 + x2 - a1 - a2) / 2 / w, (y1 + y2 - b1 - b2) / 2 / h)
                wanted += (math.log((x2 - x1) / w), math.log((y2 - y1) / h))
                regression += sum(abs(d - t) for d, t in zip(deltas[image, anchor].tolist(), wanted, strict=True))
    assert losses["classification"].item() == pytest.approx(classification / 4, rel=1e-6)
    assert losses["bbox_regression"].item() == pytest.approx(regression / 4, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_focal_loss_and_its_gradient_are_torchvisions(scale):
    logits = (scale * torch.randn(3, 50, 4, dtype=torch.double)).requires_grad_()
    matched = torch.randint(-2, 3, (3, 50))
    counted, positive = matched != -2, matched >= 0
    labels = torch.randint(0, 4, (int(positive.sum()),))
    wanted = torch.zeros_like(logits)
    wanted[(*positive.nonzero(as_tuple=True), labels)] = 1
    expected = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0)[counted].sum()
    found = focal_loss(logits, counted, positive, labels)
    close(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss, logits) for loss in (found, expected)), strict=True):
        close(one, other, rtol=1e-8, atol=1e-8)


def half_of_a_loss(rank: int) -> float:
    """The losses of a batch of two, or of one of its images where there are two ranks."""
    torch.manual_seed(0)
    head = RetinaNetHead(8, 9, 3, 1, None)
    logits, deltas, corners = torch.randn(2, 6, 3), torch.randn(2, 6, 4), 9 * torch.rand(6, 2)
    anchors = [torch.cat([corners, corners + 3], 1)] * 2
    found = [
        {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    matched = [torch.tensor([0, -1, 0, -2, 0, -1]), torch.full((6,), -1)]
    mine = slice(None) if rank < 0 else slice(rank, rank + 1)
    output = {"cls_logits": logits[mine], "bbox_regression": deltas[mine]}
    losses = head.compute_loss(found[mine], output, anchors[mine], matched[mine])
    return sum(loss.item() for loss in losses.values())


def test_two_ranks_have_the_loss_of_one_though_one_of_them_has_no_boxes():
    assert sum(on_ranks(2, half_of_a_loss)) / 2 == pytest.approx(half_of_a_loss(-1), rel=1e-5)


def test_an_empty_image_does_not_dominate_the_loss():
    net = build("retinanet", ENCODERS["resnet"](), 2, MEAN, STD, min_size=64, **SMALL)
    nn.init.constant_(net.head.classification_head.cls_logits.bias, -2.0)  # every anchor costs something
    with torch.no_grad():
        x = images((64, 64))
        alone = net.train()(x, targets(BOXES[0]))["classification"]
        beside = copy.deepcopy(net)(x * 2, targets(*BOXES))["classification"]
    assert beside < 2.5 * alone  # torchvision's own: by the number of positives, some tens


def test_labels_count_from_one_inside_and_out():
    for model in ("retinanet", "fcos"):
        net = build(model, ENCODERS["resnet"](), 2, MEAN, STD, min_size=64, score=0.0, **SMALL)
        nn.init.zeros_(net.head.classification_head.cls_logits.weight)
        bias = net.head.classification_head.cls_logits.bias
        bias.data = torch.tensor([-9.0, 5.0]).repeat(len(bias) // 2)  # the last class, everywhere
        (found,) = net.eval()(images((64, 64)))
        assert set(found["labels"].tolist()) == {2}
        wrong, right = targets([[8.0, 8, 40, 40]], [[8.0, 8, 40, 40]])
        wrong["labels"], right["labels"] = torch.tensor([1]), torch.tensor([2])
        x = images((64, 64))
        assert net.train()(x, [right])["classification"] < net(x, [wrong])["classification"]
