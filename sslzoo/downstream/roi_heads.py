"""R-CNNs: regions first, then for each of them a class, a box and perhaps a mask.

Faster R-CNN (Ren et al. 2015, arXiv 1506.01497), Mask R-CNN (He et al. 2017, 1703.06870).
"""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from sslzoo.downstream.anchors import RATIOS, Anchors
from sslzoo.downstream.necks import C4, Pyramid, norm_layer
from sslzoo.downstream.suppression import Suppression
from sslzoo.losses import full


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


class Heads(roi_heads.RoIHeads):
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


class Full(nn.Module):
    """``x`` in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        return full(x)


def proposal_network(body: C4 | Pyramid, size: int, proposals: int) -> nn.Module:
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


def c4_heads(body: C4, classes: int, masks: bool, convs: int, norm: str, rois: int, suppression: Suppression) -> Heads:
    """MoCo's: the last stage, one BatchNorm more, and for masks one deconvolution (``Res5ROIHeadsExtraNorm``)."""
    dim = body.encoder.widths[-1]
    pool = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0)
    stage = nn.Sequential(body.encoder.net.layer4, nn.BatchNorm2d(dim))  # the stage is in the encoder as well
    more = {"mask_predictor": MaskRCNNPredictor(dim, 256, classes + 1)} if masks else {}
    return _heads(C4Heads, pool, stage, Predictor(dim, classes + 1), rois, suppression, **more)


def fpn_heads(
    body: Pyramid, classes: int, masks: bool, convs: int, norm: str, rois: int, suppression: Suppression
) -> Heads:
    """Two linear layers, or with a norm four convolutions and one linear layer (Wu and He 2018, sec. 4.2)."""
    channels = body.out_channels
    align = partial(MultiScaleRoIAlign, body.pooled, sampling_ratio=2, canonical_scale=28 * body.anchor)
    hidden = 4 * channels
    if norm == "none":
        head = TwoMLPHead(channels * 7 * 7, hidden)
    else:
        head = FastRCNNConvFCHead((channels, 7, 7), [channels] * convs, [hidden], norm_layer=norm_layer(norm))
    more = {}
    if masks:
        more = {
            "mask_roi_pool": align(output_size=14),
            "mask_head": MaskRCNNHeads(channels, [channels] * convs, 1, norm_layer=norm_layer(norm)),
            "mask_predictor": nn.Sequential(MaskRCNNPredictor(channels, channels, classes + 1), Full()),
        }
    return _heads(Heads, align(output_size=7), head, Predictor(hidden, classes + 1), rois, suppression, **more)


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
