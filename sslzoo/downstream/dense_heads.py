"""One-stage detectors: a class and a box at every place of every level.

RetinaNet (Lin et al. 2017, arXiv 1708.02002), FCOS (Tian et al. 2019, 1904.01355).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection import fcos
from torchvision.models.detection import retinanet as torchvisions

from sslzoo.dist import all_mean
from sslzoo.downstream.anchors import RATIOS, Anchors
from sslzoo.downstream.necks import Norm, Pyramid, norm_layer
from sslzoo.downstream.suppression import Suppression
from sslzoo.losses import full


class RetinaNet(detection.RetinaNet):
    """torchvision's with labels from 1, and a choice of suppression."""

    suppression = Suppression()

    def compute_loss(self, targets, head_outputs, anchors) -> dict[str, Tensor]:
        return super().compute_loss(_from_zero(targets), head_outputs, anchors)

    def postprocess_detections(self, head_outputs, anchors, image_shapes) -> list[dict[str, Tensor]]:
        return _from_one(super().postprocess_detections(head_outputs, anchors, image_shapes), self.suppression)


class FCOS(detection.FCOS):
    """torchvision's with labels from 1, and a choice of suppression; its loss is one over the whole batch already."""

    suppression = Suppression()

    def compute_loss(self, targets, head_outputs, anchors, num_anchors_per_level) -> dict[str, Tensor]:
        return super().compute_loss(_from_zero(targets), head_outputs, anchors, num_anchors_per_level)

    def postprocess_detections(self, head_outputs, anchors, image_shapes) -> list[dict[str, Tensor]]:
        return _from_one(super().postprocess_detections(head_outputs, anchors, image_shapes), self.suppression)


def _from_zero(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{**target, "labels": target["labels"] - 1} for target in targets]


def _from_one(found: list[dict[str, Tensor]], suppression: Suppression) -> list[dict[str, Tensor]]:
    kept = (suppression(each["boxes"], each["scores"], each["labels"] + 1) for each in found)
    return [dict(zip(("boxes", "scores", "labels"), each, strict=True)) for each in kept]


class RetinaNetHead(torchvisions.RetinaNetHead):
    """torchvision's, its losses divided by the positive anchors of the whole batch on all ranks.

    torchvision divides image by image, by at least one: an image without boxes would outweigh all others by far.

    Args:
        channels: of the levels.
        anchors: at each place.
        classes: C.
        convs: of each tower.
        norm: after each of them.
    """

    def __init__(self, channels: int, anchors: int, classes: int, convs: int, norm: Norm):
        super().__init__(channels, anchors, classes, norm_layer=norm)
        for tower in (self.classification_head, self.regression_head):
            tower.conv = nn.Sequential(*list(tower.conv)[:convs])

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: full(output) for name, output in super().forward(x).items()}

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs) -> dict[str, Tensor]:
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]  # (B, A, C), (B, A, 4)
        matched = torch.stack(matched_idxs)  # (B, A): a target of the image, -1 background, -2 neither
        positive = matched >= 0
        counts = torch.tensor([len(target["labels"]) for target in targets], device=matched.device)
        rows = (matched + (counts.cumsum(0) - counts)[:, None])[positive]  # of the batch's targets
        labels = torch.cat([target["labels"] for target in targets])[rows]
        boxes = torch.cat([target["boxes"] for target in targets])[rows]
        coder = self.regression_head.box_coder
        wanted_deltas = coder.encode_single(boxes, torch.stack(list(anchors))[positive])
        normaliser = all_mean(positive.sum().float()).clamp(min=1)
        return {
            "classification": focal_loss(logits, matched != -2, positive, labels) / normaliser,
            "bbox_regression": F.l1_loss(deltas[positive], wanted_deltas, reduction="sum") / normaliser,
        }


def focal_loss(logits: Tensor, counted: Tensor, positive: Tensor, labels: Tensor) -> Tensor:
    """Sum of Lin et al. 2017, eq. 5, with alpha = 0.25 and gamma = 2, over all classes of the anchors that count.

    Nearly all logits are of classes that are not there: all of them are taken for such, then the few others are put
    right. This needs a third of the memory and half of the time of one-hot targets.

    Args:
        logits: ``(B, A, C)``.
        counted: ``(B, A)`` bool.
        positive: ``(B, A)`` bool, anchors with an object; they count.
        labels: of these objects, ``(P,)`` int64 from 0.
    """
    absent = logits.sigmoid().square() * F.softplus(logits)  # p^2 -log(1 - p)
    own = logits[positive].gather(1, labels[:, None])  # (P, 1)
    present = 0.25 * (-own).sigmoid().square() * F.softplus(-own)
    wrongly = 0.75 * own.sigmoid().square() * F.softplus(own)
    return 0.75 * absent.sum(2)[counted].sum() + (present - wrongly).sum()


class FCOSHead(fcos.FCOSHead):
    """torchvision's with GroupNorm for any number of channels, or without norm."""

    def __init__(self, channels: int, classes: int, convs: int, norm: Norm):
        super().__init__(32, 1, classes, num_convs=0)
        layer = norm or nn.Identity
        self.classification_head = fcos.FCOSClassificationHead(channels, 1, classes, convs, norm_layer=layer)
        self.regression_head = fcos.FCOSRegressionHead(channels, 1, convs, norm_layer=layer)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: full(output) for name, output in super().forward(x).items()}


def build_retinanet(body: Pyramid, classes: int, convs: int, norm: str, suppression: Suppression) -> nn.Module:
    """RetinaNet on ``body``, for ``classes`` classes.

    Args:
        body: from an image to levels.
        classes: C, without background.
        convs: convolutions of each tower.
        norm: after each of them.
        suppression: of overlapping boxes.
    """
    sizes = [[body.anchor * stride * 2 ** (octave / 3) for octave in range(3)] for stride in body.strides]
    head = RetinaNetHead(body.out_channels, 9, classes, convs, norm_layer(norm))
    anchors = Anchors(sizes, RATIOS, body.strides)
    net = RetinaNet(body, classes, anchor_generator=anchors, head=head, **suppression.torchvisions)
    net.suppression = suppression
    return net


def build_fcos(body: Pyramid, classes: int, convs: int, norm: str, suppression: Suppression) -> nn.Module:
    """FCOS on ``body``, for ``classes`` classes.

    Args:
        body: from an image to levels.
        classes: C, without background.
        convs: convolutions of each tower.
        norm: after each of them.
        suppression: of overlapping boxes.
    """
    anchors = Anchors([[stride] for stride in body.strides], [1.0], body.strides)  # only their centres count
    head = FCOSHead(body.out_channels, classes, convs, norm_layer(norm))
    net = FCOS(body, classes, anchor_generator=anchors, head=head, **suppression.torchvisions)
    net.suppression = suppression
    return net
