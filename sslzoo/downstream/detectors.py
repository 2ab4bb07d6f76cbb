"""Detectors on any backbone: torchvision's, fed by an encoder's stage maps.

Faster R-CNN (Ren et al. 2015, arXiv 1506.01497), Mask R-CNN (He et al. 2017, 1703.06870), FPN (Lin et al. 2017,
1612.03144), RetinaNet (Lin et al. 2017, 1708.02002), FCOS (Tian et al. 2019, 1904.01355). What MoCo's comparisons ask
of them: nothing is frozen, BatchNorm learns and has one layer more after the last stage of a C4 head.

A detector takes a list of images ``(3, H, W)`` in 0..1 and, to train, a list of targets with ``boxes`` (n, 4), as
corners in pixels, and ``labels`` (n,) int64 from 1 to C. It returns losses by name when it trains, else for each image
``boxes``, ``scores``, ``labels`` and perhaps ``masks`` (n, 1, H, W), the best first.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection import fcos, retinanet, roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, sigmoid_focal_loss

from sslzoo.blocks import Encoder
from sslzoo.dist import all_mean
from sslzoo.errors import UserError
from sslzoo.losses import full

MODELS = ("retinanet", "fcos", "faster_rcnn_fpn", "mask_rcnn_fpn", "faster_rcnn_c4", "mask_rcnn_c4")
NORMS = ("none", "group", "batch")
NMS = ("hard", "soft")
Norm = Callable[[int], nn.Module] | None


def build(
    model: str,
    encoder: Encoder,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    channels: int = 256,
    convs: int = 4,
    norm: str = "none",
    rois: int = 512,
    proposals: int = 1000,
    score: float = 0.05,
    nms: str = "hard",
    iou: float = 0.5,
    sigma: float = 0.3,
    detections: int = 100,
) -> nn.Module:
    """A detector that trains ``encoder``, with new heads.

    Args:
        model: one of ``MODELS``.
        encoder: any; the detector goes on with its very weights.
        classes: C, without background.
        mean, std: what the encoder's images were normalised with.
        min_size: images are resized until their shorter side is so long (training draws one of several, evaluation
            takes the last); an image of that size stays as it is. Anchors follow the last.
        max_size: unless the longer side would exceed this.
        channels: of the pyramid.
        convs: convolutions of a head, with one-stage detectors in each of its two towers.
        norm: after convolutions of the pyramid and of heads: ``none``, ``group``, or ``batch``, which becomes
            SyncBatchNorm on more than one device. A one-stage head is shared by all levels, whose statistics differ,
            so it has no BatchNorm.
        rois: regions an image that train the second stage of an R-CNN.
        proposals: regions an image that it looks at.
        score, nms, iou, sigma, detections: see ``Suppression``.

    Raises:
        UserError: on an unknown choice, or an encoder that does not fit ``model``.
    """
    for key, value, allowed in (("model", model, MODELS), ("norm", norm, NORMS), ("nms", nms, NMS)):
        if value not in allowed:
            raise UserError(f"task.{key}={value} is none of {', '.join(allowed)}")
    if classes < 1:
        raise UserError(f"a detector needs at least one class, these data have {classes}")
    sizes = [min_size] if isinstance(min_size, int) else list(min_size)
    if not 0 < max(sizes) <= max_size:
        raise UserError(f"task.max_size={max_size} is less than task.min_size={max(sizes)}; set it to as much or more")
    c4, masks, size = model.endswith("c4"), model.startswith("mask"), sizes[-1]
    suppression = Suppression(nms, iou, sigma, score, detections)
    encoder = of_any_size(encoder)
    body = C4(encoder, model) if c4 else Pyramid(encoder, model, size, channels, norm)
    transform = GeneralizedRCNNTransform(sizes, max_size, list(mean), list(std), size_divisible=body.divisible)
    if "rcnn" not in model:
        if norm == "batch":
            raise UserError(f"task.norm=batch does not fit {model}, whose head all levels share; set task.norm=group")
        make = _retinanet if model == "retinanet" else _fcos
        net = make(body, classes, convs, norm, suppression)
        net.transform = transform
        return net
    rpn = _rpn(body, size, proposals)
    make_heads = _c4_heads if c4 else _fpn_heads
    heads = make_heads(body, classes, masks, convs, norm, rois, suppression)
    return GeneralizedRCNN(body, rpn, heads, transform)


def of_any_size(encoder: Encoder) -> Encoder:
    """``encoder``, or one of the same weights that takes images of any size: ViT and Swin insist on one by default."""
    if getattr(encoder.net, "dynamic_img_size", True):
        return encoder
    options = {**encoder.config["options"], "dynamic_img_size": True}
    new = type(encoder)(**{**encoder.config, "options": options})
    new.load_state_dict(encoder.state_dict())  # strict: no key missing, none left over
    new.metadata = encoder.metadata
    return new.to(next(encoder.parameters()).device)


# Bodies: from an image to maps


class C4(nn.Module):
    """The encoder up to its last stage but one: ``(B, 3, H, W) -> {"0": (B, out_channels, H / s, W / s)}``.

    Args:
        encoder: a ResNet; its last stage is left to the head.
        model: for the message.

    Raises:
        UserError: if it is no whole ResNet.
    """

    def __init__(self, encoder: Encoder, model: str):
        super().__init__()
        if not isinstance(encoder.net, ResNet) or len(encoder.widths) < 4:
            kind = f"{encoder.config['name']} as {type(encoder).__name__}"
            raise UserError(
                f"task.model={model} takes a ResNet's last stage as its head, and {kind} has none to give;"
                f" set task.model={model.replace('c4', 'fpn')}"
            )
        self.encoder = encoder
        self.out_channels = encoder.widths[-2]
        self.strides = [encoder.strides[-2]]
        self.divisible = self.strides[0]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        (c4,) = self.encoder.net.forward_intermediates(x, indices=[3], stop_early=True, intermediates_only=True)
        return OrderedDict([("0", full(c4))])


class Pyramid(nn.Module):
    """The encoder and a feature pyramid on it: ``(B, 3, H, W) -> {"0": (B, channels, H / strides[0], ...), ...}``.

    An encoder whose stages have several strides gets an FPN, a plain one (ViT) the simple pyramid of ViTDet; levels
    go on by strided convolutions (one-stage) or subsampling (R-CNN) to where anchors are as large as images. Large
    images have the papers' levels: strides 8 to 128 for one-stage detectors, 4 to 64 for an R-CNN. Images of less
    than 400 pixels begin at stride 4, with anchors of 4 x stride.

    Args:
        encoder: any with stage maps.
        model: one-stage or R-CNN.
        size: of the images' shorter side.
        channels: of every level.
        norm: see ``build``.

    Attributes:
        out_channels: the same.
        strides: of the levels.
        anchor: side of an anchor, in strides.
        pooled: names of the levels that regions are cut from.
        divisible: images are padded to a multiple of this.

    Raises:
        UserError: if the encoder has no maps at these strides.
    """

    def __init__(self, encoder: Encoder, model: str, size: int, channels: int, norm: str):
        super().__init__()
        two_stages, large = "rcnn" in model, size >= 400
        finest = 8 if large and not two_stages else 4
        self.anchor = 8 if large and two_stages else 4
        self.encoder, self.out_channels = encoder, channels
        plain = len(set(encoder.strides)) == 1
        self.neck = SimplePyramid(encoder, channels, finest) if plain else StagePyramid(encoder, channels, norm, finest)
        strides = list(self.neck.strides)
        self.pooled = [str(level) for level in range(len(strides))]
        self.divisible = strides[-1]
        # Up to anchors of 0.8 of the image: 512 pixels of 640 to 800, as in the papers
        while 2 * self.anchor * strides[-1] <= 0.8 * size:
            strides.append(2 * strides[-1])
        self.strides = strides
        more = len(strides) - len(self.neck.strides)
        self.coarser = nn.ModuleList() if two_stages else nn.ModuleList(_halving(channels) for _ in range(more))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = [full(level) for level in self.neck(self.encoder.maps(x))]
        for i in range(len(self.strides) - len(levels)):
            last = levels[-1]
            if not len(self.coarser):
                levels.append(F.max_pool2d(last, kernel_size=1, stride=2))
            else:
                levels.append(full(self.coarser[i](last.relu() if i else last)))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


class StagePyramid(nn.Module):
    """FPN on the stages of stride ``finest`` or more: the encoder's maps in, levels out.

    Attributes:
        strides: of the levels.
    """

    def __init__(self, encoder: Encoder, channels: int, norm: str, finest: int):
        super().__init__()
        self.skip = sum(stride < finest for stride in encoder.strides)
        self.strides = encoder.strides[self.skip :]
        if not self.strides or self.strides != sorted(set(self.strides)):
            raise UserError(
                f"{encoder.config['name']} has maps at strides {encoder.strides}, of which no pyramid from {finest}"
                " upwards can be made; take a backbone like a ResNet, ConvNeXt, Swin or ViT"
            )
        self.fpn = FeaturePyramidNetwork(encoder.widths[self.skip :], channels, norm_layer=_norm(norm))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        named = OrderedDict((str(i), stage) for i, stage in enumerate(maps[self.skip :]))
        return list(self.fpn(named).values())


class SimplePyramid(nn.Module):
    """ViTDet's pyramid (Li et al. 2022, arXiv 2203.16527, sec. 3): the last map, up- and down-sampled.

    ``[..., (B, D, H / p, W / p)] -> [(B, channels, H / s, W / s) for s in (p / 4, p / 2, p, 2p)]``, each by
    deconvolutions or pooling, then a 1x1 and a 3x3 convolution with LayerNorm. Levels below stride ``finest`` are
    left out.

    Attributes:
        strides: s.
    """

    def __init__(self, encoder: Encoder, channels: int, finest: int):
        super().__init__()
        dim, stride = encoder.widths[-1], encoder.strides[-1]
        if dim % 4 or stride % 4:
            raise UserError(
                f"{encoder.config['name']} has {dim} channels at stride {stride}, which do not split into four; the"
                " simple pyramid needs patches of 4, 8, 16 or 32 pixels"
            )
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        every = {
            stride // 4: ([up(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), up(dim // 2, dim // 4)], dim // 4),
            stride // 2: ([up(dim, dim // 2)], dim // 2),
            stride: ([], dim),
            2 * stride: ([nn.MaxPool2d(2)], dim),
        }
        scales = {s: layers for s, layers in every.items() if s >= min(finest, 2 * stride)}
        self.strides = list(scales)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scale,
                nn.Conv2d(width, channels, kernel_size=1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for scale, width in scales.values()
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [level(maps[-1]) for level in self.levels]


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over channels: ``(B, C, H, W) -> (B, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _halving(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)
    return conv


def _norm(norm: str) -> Norm:
    if norm == "none":
        return None
    return nn.BatchNorm2d if norm == "batch" else group_norm


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm in groups of 8 channels or more, 32 of them at most (Wu and He 2018)."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 8), channels), channels)


# Anchors, and what becomes of boxes


class Anchors(AnchorGenerator):
    """torchvision's, at the strides the levels really have, in float32 whatever the maps were computed in.

    Args:
        sizes: sides of the anchors at each level.
        ratios: height by width, at every level.
        strides: of the levels.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int]):
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        each = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [each] * len(image_list.image_sizes)


@dataclass(frozen=True)
class Suppression:
    """Which of many overlapping boxes stay.

    Args:
        kind: ``hard`` drops a box that overlaps a better one of its class by more than ``iou``; ``soft`` lowers its
            score by ``exp(-overlap^2 / sigma)`` (Bodla et al. 2017, arXiv 1704.04503).
        iou: of hard suppression.
        sigma: of soft suppression; 0.3 as in Zoph et al. 2020.
        score: boxes of a lower score are dropped.
        limit: at most so many boxes an image.
    """

    kind: str = "hard"
    iou: float = 0.5
    sigma: float = 0.3
    score: float = 0.05
    limit: int = 100

    @property
    def torchvisions(self) -> dict[str, float]:
        """Settings of torchvision's own suppression, which leaves every box to ``__call__`` where ours is soft."""
        soft = self.kind == "soft"
        iou, limit = (1.0, 10**6) if soft else (self.iou, self.limit)
        return {"score_thresh": self.score, "nms_thresh": iou, "detections_per_img": limit}

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (n, 4), scores (n,) and labels (n,) that stay, the best first."""
        if self.kind == "hard":
            return boxes, scores, labels
        kept, scores = soft_nms(boxes, scores, labels, self.sigma, self.score, self.limit)
        return boxes[kept], scores, labels[kept]


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, sigma: float = 0.3, score: float = 0.05, limit: int = 100
) -> tuple[Tensor, Tensor]:
    """Soft-NMS with a Gaussian (Bodla et al. 2017, sec. 3), all classes at once.

    The best box of a class is taken, the others of that class are lowered by ``exp(-IoU^2 / sigma)``, and so on.

    Args:
        boxes: ``(n, 4)`` corners.
        scores: ``(n,)``, not negative.
        labels: ``(n,)``.
        sigma: width of the Gaussian.
        score: boxes that fall below it are dropped.
        limit: at most so many boxes.

    Returns:
        Rows of ``boxes`` that stay, ``(k,)``, and their lowered scores, ``(k,)``, falling.
    """
    if not len(boxes):
        return labels.new_zeros(0, dtype=torch.long), scores
    _, group, counts = labels.unique(return_inverse=True, return_counts=True)
    # One row a class, filled up with boxes of score -1: (C, m)
    order = group.argsort(stable=True)
    place = torch.arange(len(boxes), device=boxes.device) - (counts.cumsum(0) - counts)[group[order]]
    rows = order.new_zeros(len(counts), int(counts.max()))
    left = scores.new_full(rows.shape, -1.0)
    rows[group[order], place] = order
    left[group[order], place] = scores[order]
    inside = boxes[rows]  # (C, m, 4)
    areas = _area(inside)
    each = torch.arange(len(counts), device=boxes.device)
    found = []
    for _ in range(min(limit, rows.shape[1])):  # scores fall: no class has more than `limit` of the best `limit`
        best, at = left.max(1)  # (C,)
        if not (best >= score).any():
            break
        found.append((rows[each, at], best))
        taken = inside[each, at][:, None]  # (C, 1, 4)
        shared = _area(torch.cat([torch.maximum(inside, taken)[..., :2], torch.minimum(inside, taken)[..., 2:]], -1))
        union = areas + _area(taken) - shared
        overlap = torch.where(union > 0, shared / union, torch.zeros_like(union))
        left = torch.where(left < 0, left, left * torch.exp(-overlap.square() / sigma))
        left[each, at] = -1.0
    if not found:
        return order[:0], scores[:0]
    kept, lowered = torch.cat([rows for rows, _ in found]), torch.cat([best for _, best in found])
    lowered, best_first = lowered.sort(descending=True, stable=True)
    enough = lowered >= score
    return kept[best_first][enough][:limit], lowered[enough][:limit]


def _area(boxes: Tensor) -> Tensor:
    """``(..., 4) -> (...)``; an empty box has none."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


# One-stage detectors


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


class RetinaNetHead(retinanet.RetinaNetHead):
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
        wanted = torch.zeros_like(logits)
        wanted[(*positive.nonzero(as_tuple=True), torch.cat([target["labels"] for target in targets])[rows])] = 1
        boxes = torch.cat([target["boxes"] for target in targets])[rows]
        coder = self.regression_head.box_coder
        wanted_deltas = coder.encode_single(boxes, torch.stack(list(anchors))[positive])
        normaliser = all_mean(positive.sum().float()).clamp(min=1)
        focal = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0)[matched != -2]
        return {
            "classification": focal.sum() / normaliser,
            "bbox_regression": F.l1_loss(deltas[positive], wanted_deltas, reduction="sum") / normaliser,
        }


class FCOSHead(fcos.FCOSHead):
    """torchvision's with GroupNorm for any number of channels, or without norm."""

    def __init__(self, channels: int, classes: int, convs: int, norm: Norm):
        super().__init__(32, 1, classes, num_convs=0)
        layer = norm or nn.Identity
        self.classification_head = fcos.FCOSClassificationHead(channels, 1, classes, convs, norm_layer=layer)
        self.regression_head = fcos.FCOSRegressionHead(channels, 1, convs, norm_layer=layer)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: full(output) for name, output in super().forward(x).items()}


RATIOS = (0.5, 1.0, 2.0)


def _retinanet(body: Pyramid, classes: int, convs: int, norm: str, suppression: Suppression) -> nn.Module:
    sizes = [[body.anchor * stride * 2 ** (octave / 3) for octave in range(3)] for stride in body.strides]
    head = RetinaNetHead(body.out_channels, 9, classes, convs, _norm(norm))
    anchors = Anchors(sizes, RATIOS, body.strides)
    net = RetinaNet(body, classes, anchor_generator=anchors, head=head, **suppression.torchvisions)
    net.suppression = suppression
    return net


def _fcos(body: Pyramid, classes: int, convs: int, norm: str, suppression: Suppression) -> nn.Module:
    anchors = Anchors([[stride] for stride in body.strides], [1.0], body.strides)  # only their centres count
    head = FCOSHead(body.out_channels, classes, convs, _norm(norm))
    net = FCOS(body, classes, anchor_generator=anchors, head=head, **suppression.torchvisions)
    net.suppression = suppression
    return net


# Two-stage detectors


class ProposalHead(RPNHead):
    """torchvision's, its outputs in float32: boxes are decoded from them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [full(level) for level in logits], [full(level) for level in deltas]


class Predictor(FastRCNNPredictor):
    """torchvision's, its outputs in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return full(logits), full(deltas)


class Heads(RoIHeads):
    """torchvision's, with a choice of suppression."""

    suppression = Suppression()

    def postprocess_detections(self, class_logits, box_regression, proposals, image_shapes) -> tuple:
        found = super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        kept = [self.suppression(*each) for each in zip(*found, strict=True)]
        return tuple(map(list, zip(*kept, strict=True)))


class C4Heads(Heads):
    """Second stage of a C4 detector: the encoder's last stage on every region, for classes, boxes and masks alike."""

    def forward(self, features, proposals, image_shapes, targets=None) -> tuple[list[dict], dict]:
        if self.training:
            proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        x = self.box_head(self.box_roi_pool(features, proposals, image_shapes))  # (R, D, h, w)
        class_logits, box_deltas = self.box_predictor(x.mean((2, 3)))
        if not self.training:
            return self._found(features, proposals, image_shapes, class_logits, box_deltas), {}
        classification, regression = roi_heads.fastrcnn_loss(class_logits, box_deltas, labels, deltas)
        losses = {"loss_classifier": classification, "loss_box_reg": regression}
        if self.mask_predictor is not None:
            positive = [label > 0 for label in labels]
            masks = full(self.mask_predictor(x[torch.cat(positive)]))
            regions = [each[kept] for each, kept in zip(proposals, positive, strict=True)]
            rows = [each[kept] for each, kept in zip(matched, positive, strict=True)]
            true_masks, true_labels = [t["masks"] for t in targets], [t["labels"] for t in targets]
            losses["loss_mask"] = roi_heads.maskrcnn_loss(masks, regions, true_masks, true_labels, rows)
        return [], losses

    def _found(self, features, proposals, image_shapes, class_logits, box_deltas) -> list[dict]:
        boxes, scores, labels = self.postprocess_detections(class_logits, box_deltas, proposals, image_shapes)
        found = [
            {"boxes": box, "scores": score, "labels": label}
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]
        if self.mask_predictor is not None:
            x = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
            masks = roi_heads.maskrcnn_inference(full(self.mask_predictor(x)), labels)
            found = [{**each, "masks": mask} for each, mask in zip(found, masks, strict=True)]
        return found


def _rpn(body: C4 | Pyramid, size: int, proposals: int) -> nn.Module:
    """Detectron2's numbers: regions go through NMS at each level, C4's one level begins with more of them."""
    if isinstance(body, C4):
        sizes = [[size / 25 * 2**octave for octave in range(5)]]  # 32 to 512 pixels of 800
        before = {"training": 12 * proposals, "testing": 6 * proposals}
        after = {"training": 2 * proposals, "testing": proposals}
    else:
        sizes = [[body.anchor * stride] for stride in body.strides]
        before = {"training": 2 * proposals, "testing": proposals}
        after = {"training": proposals, "testing": proposals}
    anchors = Anchors(sizes, RATIOS, body.strides)
    head = ProposalHead(body.out_channels, anchors.num_anchors_per_location()[0])
    return RegionProposalNetwork(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=before,
        post_nms_top_n=after,
        nms_thresh=0.7,
    )


def _heads(kind: type[Heads], pool, head, predictor, rois: int, suppression: Suppression, **masks) -> Heads:
    heads = kind(
        pool,
        head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=rois,
        positive_fraction=0.25,
        bbox_reg_weights=None,  # torchvision's (10, 10, 5, 5)
        **suppression.torchvisions,
        **masks,
    )
    heads.suppression = suppression
    return heads


def _c4_heads(body: C4, classes: int, masks: bool, convs: int, norm: str, rois: int, suppression: Suppression) -> Heads:
    """MoCo's: the last stage, one BatchNorm more, and for masks one deconvolution (``Res5ROIHeadsExtraNorm``)."""
    dim = body.encoder.widths[-1]
    pool = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0)
    stage = nn.Sequential(body.encoder.net.layer4, nn.BatchNorm2d(dim))  # the stage is in the encoder as well
    more = {"mask_predictor": MaskRCNNPredictor(dim, 256, classes + 1)} if masks else {}
    return _heads(C4Heads, pool, stage, Predictor(dim, classes + 1), rois, suppression, **more)


def _fpn_heads(
    body: Pyramid, classes: int, masks: bool, convs: int, norm: str, rois: int, suppression: Suppression
) -> Heads:
    """Two linear layers, or with a norm four convolutions and one linear layer (Wu and He 2018, sec. 4.2)."""
    channels = body.out_channels
    align = partial(MultiScaleRoIAlign, body.pooled, sampling_ratio=2, canonical_scale=28 * body.anchor)
    hidden = 4 * channels
    if norm == "none":
        head = TwoMLPHead(channels * 7 * 7, hidden)
    else:
        head = FastRCNNConvFCHead((channels, 7, 7), [channels] * convs, [hidden], norm_layer=_norm(norm))
    more = {}
    if masks:
        more = {
            "mask_roi_pool": align(output_size=14),
            "mask_head": MaskRCNNHeads(channels, [channels] * convs, 1, norm_layer=_norm(norm)),
            "mask_predictor": nn.Sequential(MaskRCNNPredictor(channels, channels, classes + 1), Full()),
        }
    return _heads(Heads, align(output_size=7), head, Predictor(hidden, classes + 1), rois, suppression, **more)


class Full(nn.Module):
    """``x`` in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        return full(x)
