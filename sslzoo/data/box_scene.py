"""An image with boxes, masks, keypoints and class map on its way through augmentation: flip, scale, crop."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from sslzoo.data.box_set import IGNORE

MEAN = (124, 116, 104)  # what surrounds an image that is smaller than the crop: black once it is normalised
LEAST = 1.0  # pixels; a box that is narrower or lower after a crop is left out


@dataclass
class Scene:
    """An image and its n objects on the way; ``rows`` are their places in the target that came in.

    ``pixels`` (3, H, W) uint8; ``boxes`` (n, 4) float32; ``masks`` (n, H, W) uint8 or None; ``points`` (n, K, 3)
    float32 or None, whose x and y count from the corner of the image, not from the middle of its first pixel;
    ``share`` (n,) is what its area is multiplied by; ``classes`` (H, W) uint8, of every pixel, or None.
    """

    pixels: Tensor
    boxes: Tensor
    masks: Tensor | None
    points: Tensor | None
    rows: Tensor
    share: Tensor
    classes: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(self.pixels.shape[-2:])


def scene_of(image: np.ndarray, target: dict) -> Scene:
    keep = ~target["iscrowd"] if "iscrowd" in target else torch.ones(len(target["boxes"]), dtype=torch.bool)
    points = target["keypoints"][keep].clone() if "keypoints" in target else None
    if points is not None:
        points[..., :2] += 0.5
    return Scene(
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        target["boxes"][keep].clone(),
        target["masks"][keep] if "masks" in target else None,
        points,
        keep.nonzero()[:, 0],
        torch.ones(int(keep.sum())),
        target.get("class_map"),
    )


def target_of(scene: Scene, target: dict) -> dict:
    """The target of a finished scene."""
    found = {
        key: value[scene.rows] if isinstance(value, Tensor) and value.dim() else value
        for key, value in target.items()
        if key != "class_map"
    }
    found["boxes"] = scene.boxes
    if scene.classes is not None:
        found["class_map"] = scene.classes
    if "area" in target:
        found["area"] = found["area"] * scene.share
    if scene.masks is not None:
        found["masks"] = scene.masks
        found["area"] = scene.masks.sum((1, 2)).float()
    if scene.points is not None:
        points = scene.points.clone()
        height, width = scene.size
        x, y, seen = points.unbind(-1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (seen > 0)
        points[..., :2] -= 0.5
        found["keypoints"] = points * inside[..., None]
    return found


def clipped(scene: Scene) -> Scene:
    """Boxes cut at the border of the image; without the objects of which nothing is left."""
    height, width = scene.size
    before = _areas(scene.boxes)
    boxes = torch.stack([scene.boxes[:, k].clamp(0, side) for k, side in enumerate((width, height) * 2)], dim=1)
    keep = (boxes[:, 2:] - boxes[:, :2] >= LEAST).all(1)
    if scene.masks is not None:
        keep &= (scene.masks > 0).flatten(1).any(1)
    return replace(
        scene,
        boxes=boxes[keep],
        masks=None if scene.masks is None else scene.masks[keep],
        points=None if scene.points is None else scene.points[keep],
        rows=scene.rows[keep],
        share=(scene.share * _areas(boxes) / before.clamp_min(1e-9))[keep],
    )


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def flipped(scene: Scene, swap: Sequence[int] | None = None) -> Scene:
    """The mirror image, left and right keypoints swapped."""
    width = scene.size[1]
    boxes = scene.boxes.clone()
    boxes[:, [0, 2]] = width - scene.boxes[:, [2, 0]]
    points = scene.points
    if points is not None:
        points = points[:, list(swap)].clone()
        points[..., 0] = width - points[..., 0]
    masks, classes = (None if each is None else each.flip(-1) for each in (scene.masks, scene.classes))
    return replace(scene, pixels=scene.pixels.flip(-1), boxes=boxes, masks=masks, points=points, classes=classes)


def resized(scene: Scene, ratio: float) -> Scene:
    """The image ``ratio`` times as large, up to whole pixels."""
    height, width = scene.size
    size = [max(1, round(height * ratio)), max(1, round(width * ratio))]
    factors = torch.tensor([size[1] / width, size[0] / height])
    points = scene.points
    if points is not None:
        points = torch.cat([points[..., :2] * factors, points[..., 2:]], dim=-1)
    masks, classes = scene.masks, scene.classes
    if masks is not None:
        masks = F.resize_mask(masks, size) if len(masks) else _blank(size)
    if classes is not None:
        classes = F.resize_image(classes[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return replace(
        scene,
        pixels=F.resize_image(scene.pixels, size, antialias=True),
        boxes=scene.boxes * factors.repeat(2),
        masks=masks,
        points=points,
        share=scene.share * factors.prod(),
        classes=classes,
    )


def cropped(scene: Scene, size: int, rng: np.random.Generator) -> Scene:
    """A square of the image anywhere in it; what an image lacks is added below and on the right."""
    height, width = scene.size
    top, left = (int(rng.integers(max(side - size, 0) + 1)) for side in (height, width))
    rows, columns = slice(top, min(top + size, height)), slice(left, min(left + size, width))
    inner = scene.pixels[:, rows, columns]
    pixels = torch.empty((3, size, size), dtype=torch.uint8)
    pixels[:] = torch.tensor(MEAN, dtype=torch.uint8)[:, None, None]
    pixels[:, : inner.shape[1], : inner.shape[2]] = inner
    masks = scene.masks
    if masks is not None:
        whole = torch.zeros((len(masks), size, size), dtype=masks.dtype)
        whole[:, : inner.shape[1], : inner.shape[2]] = masks[:, rows, columns]
        masks = whole
    classes = scene.classes
    if classes is not None:
        whole = torch.full((size, size), IGNORE, dtype=torch.uint8)
        whole[: inner.shape[1], : inner.shape[2]] = classes[rows, columns]
        classes = whole
    corner = torch.tensor([left, top], dtype=torch.float32)
    points = scene.points
    if points is not None:
        points = torch.cat([points[..., :2] - corner, points[..., 2:]], dim=-1)
    boxes = scene.boxes - corner.repeat(2)
    return clipped(replace(scene, pixels=pixels, boxes=boxes, masks=masks, points=points, classes=classes))


def _blank(size: Sequence[int]) -> Tensor:
    return torch.zeros((0, *size), dtype=torch.uint8)
