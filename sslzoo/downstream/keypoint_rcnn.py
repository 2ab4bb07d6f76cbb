"""Keypoint R-CNN (He et al. 2017, Mask R-CNN, arXiv 1703.06870, sec. 5) on any backbone: boxes of one class, points in
each.

As detectron2 trains it: heat maps of 56 x 56 in every region, cross entropy over their pixels, the boxes' smooth L1
with beta 0.5, and half as many regions more in training than in tests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import keypointrcnn_inference, keypoints_to_heatmap
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from sslzoo.blocks import Encoder
from sslzoo.dist import all_sum, world
from sslzoo.downstream.necks import NORMS, Pyramid, of_any_size
from sslzoo.downstream.roi_heads import Heads, fpn_heads, proposal_network
from sslzoo.downstream.suppression import Suppression
from sslzoo.errors import UserError
from sslzoo.losses import full

BETA = 0.5  # where smooth L1 becomes linear (detectron2's Base-Keypoint-RCNN-FPN)


class KeypointHeads(Heads):
    """Second stage: for every region a class, a box and the heat maps of K points.

    Args:
        boxes: what finds classes and boxes; its parts are taken over.
        pool, head, predictor: from regions to heat maps.
    """

    def __init__(self, boxes: Heads, pool: nn.Module, head: nn.Module, predictor: nn.Module):
        super().__init__(
            boxes.box_roi_pool,
            boxes.box_head,
            boxes.box_predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=boxes.fg_bg_sampler.batch_size_per_image,
            positive_fraction=boxes.fg_bg_sampler.positive_fraction,
            bbox_reg_weights=boxes.box_coder.weights,
            score_thresh=boxes.score_thresh,
            nms_thresh=boxes.nms_thresh,
            detections_per_img=boxes.detections_per_img,
            keypoint_roi_pool=pool,
            keypoint_head=head,
            keypoint_predictor=predictor,
        )
        self.suppression = boxes.suppression

    def forward(self, features, proposals, image_shapes, targets=None) -> tuple[list[dict], dict]:
        if self.training:
            proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        x = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_deltas = self.box_predictor(x)
        if not self.training:
            return self._found(features, proposals, image_shapes, class_logits, box_deltas), {}
        classification, regression = box_losses(class_logits, box_deltas, torch.cat(labels), torch.cat(deltas))
        positive = [label > 0 for label in labels]
        regions = [each[kept] for each, kept in zip(proposals, positive, strict=True)]
        points = [
            target["keypoints"][rows[kept]] for target, rows, kept in zip(targets, matched, positive, strict=True)
        ]
        maps = self._maps(features, regions, image_shapes)
        return [], {
            "loss_classifier": classification,
            "loss_box_reg": regression,
            "loss_keypoint": keypoint_loss(maps, torch.cat(regions), torch.cat(points)),
        }

    def _maps(self, features, regions, image_shapes) -> Tensor:
        """Heat maps of every region, ``(R, K, 56, 56)``."""
        x = self.keypoint_roi_pool(features, regions, image_shapes)
        return full(self.keypoint_predictor(self.keypoint_head(x)))

    def _found(self, features, proposals, image_shapes, class_logits, box_deltas) -> list[dict]:
        boxes, scores, labels = self.postprocess_detections(class_logits, box_deltas, proposals, image_shapes)
        points, _ = keypointrcnn_inference(self._maps(features, boxes, image_shapes), boxes)
        return [
            {"boxes": box, "scores": score, "labels": label, "keypoints": point}
            for box, score, label, point in zip(boxes, scores, labels, points, strict=True)
        ]


def box_losses(class_logits: Tensor, box_deltas: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the classes, and smooth L1 of the boxes by the number of regions.

    Args:
        class_logits: ``(R, C + 1)``.
        box_deltas: ``(R, 4 * (C + 1))``.
        labels: ``(R,)``, 0 for background.
        wanted: ``(R, 4)``.
    """
    positive = labels > 0
    own = box_deltas.unflatten(1, (-1, 4))[positive, labels[positive]]  # (P, 4)
    regression = F.smooth_l1_loss(own, wanted[positive], beta=BETA, reduction="sum") / max(1, len(labels))
    return F.cross_entropy(class_logits, labels, reduction="sum") / max(1, len(labels)), regression


def keypoint_loss(maps: Tensor, regions: Tensor, points: Tensor) -> Tensor:
    """Which pixel of the map is the point on? The mean cross entropy over the points of all ranks in their region.

    Args:
        maps: ``(R, K, h, h)``.
        regions: ``(R, 4)``.
        points: ``(R, K, 3)``, from the image's corner.

    Returns:
        A scalar whose mean over ranks is that mean; zero where no point is labelled.
    """
    pixel, valid = keypoints_to_heatmap(points, regions, maps.shape[-1])  # (R, K) each
    valid = valid > 0
    total = F.cross_entropy(maps.flatten(2)[valid], pixel[valid], reduction="sum")
    total = total + 0 * maps.sum()  # a gradient for every parameter, even from no point
    return world() * total / all_sum(valid.sum()).clamp(min=1)


class KeypointRCNN(GeneralizedRCNN):
    """torchvision's frame around body, regions and heads.

    Keypoints of targets and predictions count from the middle of the first pixel, as COCO's; inside, from its corner.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if targets is not None:
            targets = [{**target, "keypoints": _shifted(target["keypoints"], 0.5)} for target in targets]
        found = super().forward(images, targets)
        if self.training:
            return found
        return [{**each, "keypoints": _shifted(each["keypoints"], -0.5)} for each in found]


def _shifted(points: Tensor, by: float) -> Tensor:
    return points + points.new_tensor([by, by, 0])


def build(
    encoder: Encoder,
    points: int,
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
    iou: float = 0.5,
    detections: int = 100,
) -> KeypointRCNN:
    """A Keypoint R-CNN that trains ``encoder``, with new heads and one class.

    Args:
        points: K.
        convs: convolutions of the box head; the keypoints' has twice as many, of twice the ``channels``.
        encoder, mean, std, min_size, max_size, channels, norm, rois, proposals, score, iou, detections: see
            ``detectors.build``.

    Raises:
        UserError: on an unknown choice, or an encoder without a pyramid.
    """
    if norm not in NORMS:
        raise UserError(f"task.norm={norm} is none of {', '.join(NORMS)}")
    sizes = [min_size] if isinstance(min_size, int) else list(min_size)
    if not 0 < max(sizes) <= max_size:
        raise UserError(f"task.max_size={max_size} is less than task.min_size={max(sizes)}; set it to as much or more")
    body = Pyramid(of_any_size(encoder), "keypoint_rcnn_fpn", sizes[-1], channels, norm)
    regions = proposal_network(body, sizes[-1], proposals)
    regions._post_nms_top_n["training"] = 3 * proposals // 2  # detectron2: 1,500 and 1,000
    boxes = fpn_heads(body, 1, False, convs, norm, rois, Suppression("hard", iou=iou, score=score, limit=detections))
    pool = MultiScaleRoIAlign(body.pooled, output_size=14, sampling_ratio=2, canonical_scale=28 * body.anchor)
    head = KeypointRCNNHeads(channels, [2 * channels] * (2 * convs))
    heads = KeypointHeads(boxes, pool, head, KeypointRCNNPredictor(2 * channels, points))
    transform = GeneralizedRCNNTransform(sizes, max_size, list(mean), list(std), size_divisible=body.divisible)
    return KeypointRCNN(body, regions, heads, transform)
