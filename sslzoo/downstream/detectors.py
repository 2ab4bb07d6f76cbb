"""Detectors on any backbone: torchvision's, fed by an encoder's stage maps.

RetinaNet and FCOS (``dense_heads``), Faster and Mask R-CNN (``roi_heads``), on a pyramid or on one map (``necks``).
What MoCo's comparisons ask of them: nothing is frozen, BatchNorm learns and has one layer more after the last stage of
a C4 head.

A detector takes a list of images ``(3, H, W)`` in 0..1 and, to train, a list of targets with ``boxes`` (n, 4), as
corners in pixels, and ``labels`` (n,) int64 from 1 to C. It returns losses by name when it trains, else for each image
``boxes``, ``scores``, ``labels`` and perhaps ``masks`` (n, 1, H, W), the best first.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from sslzoo.blocks import Encoder
from sslzoo.downstream.dense_heads import FCOS, build_fcos, build_retinanet
from sslzoo.downstream.necks import C4, NORMS, Pyramid, of_any_size
from sslzoo.downstream.roi_heads import c4_heads, fpn_heads, proposal_network
from sslzoo.downstream.suppression import KINDS, Suppression
from sslzoo.errors import UserError

MODELS = ("retinanet", "fcos", "faster_rcnn_fpn", "mask_rcnn_fpn", "faster_rcnn_c4", "mask_rcnn_c4")


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
    for key, value, allowed in (("model", model, MODELS), ("norm", norm, NORMS), ("nms", nms, KINDS)):
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
    transform = Transform(sizes, max_size, list(mean), list(std), size_divisible=body.divisible)
    if "rcnn" not in model:
        if norm == "batch":
            raise UserError(f"task.norm=batch does not fit {model}, whose head all levels share; set task.norm=group")
        make = build_retinanet if model == "retinanet" else build_fcos
        net = make(body, classes, convs, norm, suppression)
        net.transform = transform
        return net
    rpn = proposal_network(body, size, proposals)
    make_heads = c4_heads if c4 else fpn_heads
    heads = make_heads(body, classes, masks, convs, norm, rois, suppression)
    return GeneralizedRCNN(body, rpn, heads, transform)


def losses_of(
    detector: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]], counted: Sequence[int]
) -> dict[str, Tensor]:
    """A detector's losses of those images that count, where all of them pass the backbone.

    So BatchNorm has as many images in every step and on every rank, however few of them count.

    Args:
        detector: from ``build``, in training mode.
        images, targets: see above; B of each.
        counted: places in the batch, one at least.

    Returns:
        What ``detector`` returns of images and targets if all of them count.
    """
    batch, targets = detector.transform(images, targets)
    maps = {name: level[counted] for name, level in detector.backbone(batch.tensors).items()}
    batch = ImageList(batch.tensors[counted], [batch.image_sizes[i] for i in counted])
    targets = [targets[i] for i in counted]
    if isinstance(detector, GeneralizedRCNN):
        regions, losses = detector.rpn(batch, maps, targets)
        return losses | detector.roi_heads(maps, regions, batch.image_sizes, targets)[1]
    levels = list(maps.values())
    outputs, anchors = detector.head(levels), detector.anchor_generator(batch, levels)
    if isinstance(detector, FCOS):
        return detector.compute_loss(targets, outputs, anchors, [level.shape[-2:].numel() for level in levels])
    return detector.compute_loss(targets, outputs, anchors)


class Transform(GeneralizedRCNNTransform):
    """torchvision's, without the work of resizing an image to the size it has."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        size, shape = set(self.min_size if self.training else self.min_size[-1:]), image.shape[-2:]
        if size == {min(shape)} and max(shape) <= self.max_size:
            return image, target
        return super().resize(image, target)
