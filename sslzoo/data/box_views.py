"""Augmentation of images together with boxes, masks, keypoints and class maps: Augment-S1 to S4 of Zoph et al. 2020
(2006.06882).

S1 flips, scales by 0.8 to 1.2 and crops. S2 puts AutoAugment for detection (Zoph et al. 2019, 1906.11172, policy v0)
before that. S3 scales by 0.5 to 2. S4 scales likewise, after RandAugment (Cubuk et al. 2020, 1909.13719) instead. These
scales are relative to the crop. ``own_scale`` flips, scales by 0.5 to 2 of the image's own size and crops, as FCNs are
trained (He et al. 2020, 1911.05722, appendix).

What happens is a pure function of the key, so ``sslzoo.views.draw.key(seed, epoch, index)`` repeats it anywhere.
Distances of AutoAugment, in the paper pixels of images of about 640, are relative to the longer side here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from sslzoo.data.box_set import IGNORE
from sslzoo.errors import UserError

GRAY = 128.0  # what AutoAugment's operations uncover
MEAN = (124, 116, 104)  # what surrounds an image that is smaller than the crop: black once it is normalised
LEAST = 1.0  # pixels; a box that is narrower or lower after a crop is left out


class Strength(NamedTuple):
    """How far an image is scaled, relative to the crop or to the image itself, and what is done to it before."""

    scale: tuple[float, float]
    policy: str | None
    of_crop: bool = True


STRENGTHS = {
    "s1": Strength((0.8, 1.2), None),
    "s2": Strength((0.8, 1.2), "autoaugment"),
    "s3": Strength((0.5, 2.0), "autoaugment"),
    "s4": Strength((0.5, 2.0), "randaugment"),
    "own_scale": Strength((0.5, 2.0), None, of_crop=False),
}
AUTOAUGMENT = (  # policy v0: operation, probability, level of 10
    (("translate_x", 0.6, 4), ("equalize", 0.8, 10)),
    (("translate_y_in_boxes", 0.2, 2), ("cutout", 0.8, 8)),
    (("sharpness", 0.0, 8), ("shear_x", 0.4, 0)),
    (("shear_y", 1.0, 2), ("translate_y_in_boxes", 0.6, 6)),
    (("rotate", 0.6, 10), ("color", 1.0, 6)),
)
RANDAUGMENT = (1, 5)  # operations, and their level of 10: the paper's for COCO


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


def augmented(
    image: np.ndarray,
    target: dict,
    strength: str = "s1",
    size: int = 512,
    key: int = 0,
    swap: Sequence[int] | None = None,
) -> tuple[Tensor, dict]:
    """One random view of an image and what is annotated in it; crowds are left out.

    Args:
        image: ``(H, W, 3)`` uint8.
        target: as ``BoxSet.target`` returns it; perhaps with ``class_map`` (H, W) of uint8.
        strength: one of ``STRENGTHS``.
        size: side of the view in pixels.
        key: of all random draws.
        swap: which keypoint each becomes in a mirror (``BoxSet.swap``); needed where there are keypoints.

    Returns:
        The view, ``(3, size, size)`` uint8, and the target of what is left in it, with boxes inside the view. Its
        class map ``(size, size)`` is 255 where the image does not reach.

    Raises:
        UserError: if there is no such strength.
    """
    if strength not in STRENGTHS:
        raise UserError(f"augment={strength} is none of {', '.join(STRENGTHS)}")
    if "keypoints" in target and swap is None:
        raise ValueError("keypoints need swap: BoxSet.swap")
    rng = np.random.default_rng(key)
    scene = _scene(image, target)
    for operation, level in _drawn(STRENGTHS[strength].policy, rng):
        scene = operation(scene, level, rng)
    scene = _placed(scene, STRENGTHS[strength], size, rng, swap)
    return scene.pixels, _target(scene, target)


def twins(image: np.ndarray, strength: str = "s1", size: int = 512, key: int = 0) -> tuple[Tensor, Tensor]:
    """One random view of an image twice, as it is and distorted; everything is at the same place in both.

    It is flipped, scaled and cropped as ``strength`` says, then one copy goes through the operations of its policy that
    leave everything where it is: colours and cutout. Those that move something are left out where they are drawn.

    Args:
        image, strength, size, key: see ``augmented``.

    Returns:
        Both views, ``(3, size, size)`` uint8; one tensor where nothing was distorted.
    """
    rng = np.random.default_rng(key)
    clean = scene = _placed(_scene(image, {"boxes": torch.zeros(0, 4)}), STRENGTHS[strength], size, rng)
    for operation, level in _drawn(STRENGTHS[strength].policy, rng):
        if operation in IN_PLACE:
            scene = operation(scene, level, rng)
    return clean.pixels, scene.pixels


def _drawn(policy: str | None, rng: np.random.Generator) -> Iterator[tuple["Operation", float]]:
    """The operations of a policy for one image, and their levels; each draws its own before the next is drawn."""
    if policy == "autoaugment":
        for name, p, level in AUTOAUGMENT[rng.integers(len(AUTOAUGMENT))]:
            if rng.random() < p:
                yield AUTO[name], level / 10
    elif policy == "randaugment":
        count, level = RANDAUGMENT
        for k in rng.integers(len(RAND), size=count):
            yield RAND[k], level / 10


def _placed(
    scene: Scene, strength: Strength, size: int, rng: np.random.Generator, swap: Sequence[int] | None = None
) -> Scene:
    """A square of the image, perhaps of its mirror image, at a random scale."""
    if rng.random() < 0.5:
        scene = flipped(scene, swap)
    ratio = rng.uniform(*strength.scale)
    if strength.of_crop:
        ratio *= size / max(scene.size)
    return cropped(resized(scene, ratio), size, rng)


def mirrored(image: np.ndarray, target: dict, key: int = 0, swap: Sequence[int] | None = None) -> tuple[Tensor, dict]:
    """An image ``(H, W, 3)`` uint8 and its target, or both in a mirror; crowds are left out.

    Args:
        image, target, key, swap: see ``augmented``.

    Returns:
        The image, ``(3, H, W)`` uint8, and its target.
    """
    scene = _scene(image, target)
    if np.random.default_rng(key).random() < 0.5:
        scene = flipped(scene, swap)
    return scene.pixels, _target(scene, target)


def _scene(image: np.ndarray, target: dict) -> Scene:
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


def _target(scene: Scene, target: dict) -> dict:
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


def _clipped(scene: Scene) -> Scene:
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


# ---- flip, scale, crop ----


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
    return _clipped(replace(scene, pixels=pixels, boxes=boxes, masks=masks, points=points, classes=classes))


def _blank(size: Sequence[int]) -> Tensor:
    return torch.zeros((0, *size), dtype=torch.uint8)


# ---- operations of the policies: (scene, level of 0 to 1, random draws) -> scene ----

Operation = Callable[[Scene, float, np.random.Generator], Scene]


def moved(
    scene: Scene,
    angle: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Scene:
    """The image turned (degrees), moved (pixels) or slanted (degrees) about its middle; a box becomes the hull."""
    values = {"angle": angle, "translate": [round(t) for t in translate], "scale": 1.0, "shear": list(shear)}
    pixels = F.affine_image(scene.pixels, **values, interpolation=InterpolationMode.BILINEAR, fill=[GRAY])
    x1, y1, x2, y2 = scene.boxes.unbind(1)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=1).reshape(-1, 4, 2)
    corners, _ = F.affine_keypoints(corners, scene.size, **values)
    points, masks, classes = scene.points, scene.masks, scene.classes
    if points is not None:
        places, _ = F.affine_keypoints(points[..., :2].contiguous(), scene.size, **values)
        points = torch.cat([places, points[..., 2:]], dim=-1)
    if masks is not None and len(masks):
        masks = F.affine_mask(masks, **values)
    if classes is not None:
        classes = F.affine_mask(classes[None], **values, fill=[IGNORE])[0]
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    return _clipped(replace(scene, pixels=pixels, boxes=boxes, masks=masks, points=points, classes=classes))


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _coloured(change: Callable[[Tensor, float], Tensor]) -> Operation:
    """An operation that leaves everything where it is."""

    def operation(scene: Scene, level: float, rng: np.random.Generator) -> Scene:
        return replace(scene, pixels=change(scene.pixels, level))

    return operation


def _either_way(change: Callable[[Tensor, float], Tensor]) -> Operation:
    """RandAugment's: by a factor of 0.1 to 1.9, as far below 1 as above."""

    def operation(scene: Scene, level: float, rng: np.random.Generator) -> Scene:
        factor = 1 + _signed(0.9 * level, rng)
        return _coloured(lambda pixels, _: change(pixels, factor))(scene, level, rng)

    return operation


def _rotate(scene: Scene, level: float, rng: np.random.Generator) -> Scene:
    return moved(scene, angle=_signed(30 * level, rng))


def _shear(axis: int) -> Operation:
    def operation(scene: Scene, level: float, rng: np.random.Generator) -> Scene:
        angle = float(np.degrees(np.arctan(_signed(0.3 * level, rng))))
        return moved(scene, shear=(angle, 0.0) if axis == 0 else (0.0, angle))

    return operation


def _translate(axis: int, furthest: float) -> Operation:
    """By up to ``furthest`` of the longer side."""

    def operation(scene: Scene, level: float, rng: np.random.Generator) -> Scene:
        pixels = _signed(furthest * level * max(scene.size), rng)
        return moved(scene, translate=(pixels, 0.0) if axis == 0 else (0.0, pixels))

    return operation


def _cutout(scene: Scene, level: float, rng: np.random.Generator) -> Scene:
    """A gray square over the image; boxes and classes stay."""
    height, width = scene.size
    half = round(100 / 640 * level * max(height, width))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    pixels = scene.pixels.clone()
    pixels[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = int(GRAY)
    return replace(scene, pixels=pixels)


def _translate_y_in_boxes(scene: Scene, level: float, rng: np.random.Generator) -> Scene:
    """What is in a box, up or down within it, for one box in three; not where anything but boxes would be torn off."""
    if any(each is not None for each in (scene.masks, scene.points, scene.classes)):
        return scene
    pixels = scene.pixels.clone()
    for x1, y1, x2, y2 in scene.boxes.round().int().tolist():
        if rng.random() < 1 / 3 and x2 > x1 and y2 > y1:
            down = round(_signed(120 / 640 * level * max(scene.size), rng))
            inside = pixels[:, y1:y2, x1:x2].clone()
            shifted = torch.full_like(inside, int(GRAY))
            if down >= 0:
                shifted[:, down:] = inside[:, : max(inside.shape[1] - down, 0)]
            else:
                shifted[:, :down] = inside[:, -down:]
            pixels[:, y1:y2, x1:x2] = shifted
    return replace(scene, pixels=pixels)


AUTO: dict[str, Operation] = {
    "translate_x": _translate(0, 250 / 640),
    "translate_y_in_boxes": _translate_y_in_boxes,
    "shear_x": _shear(0),
    "shear_y": _shear(1),
    "rotate": _rotate,
    "cutout": _cutout,
    "equalize": _coloured(lambda pixels, _: F.equalize_image(pixels)),
    "color": _coloured(lambda pixels, level: F.adjust_saturation_image(pixels, 0.1 + 1.8 * level)),
    "sharpness": _coloured(lambda pixels, level: F.adjust_sharpness_image(pixels, 0.1 + 1.8 * level)),
}
RAND: tuple[Operation, ...] = (
    lambda scene, level, rng: scene,
    _shear(0),
    _shear(1),
    _translate(0, 150 / 331),
    _translate(1, 150 / 331),
    _rotate,
    _either_way(F.adjust_brightness_image),
    _either_way(F.adjust_saturation_image),
    _either_way(F.adjust_contrast_image),
    _either_way(F.adjust_sharpness_image),
    _coloured(lambda pixels, level: F.posterize_image(pixels, 8 - round(4 * level))),
    _coloured(lambda pixels, level: F.solarize_image(pixels, 255 * (1 - level))),
    _coloured(lambda pixels, _: F.autocontrast_image(pixels)),
    _coloured(lambda pixels, _: F.equalize_image(pixels)),
)
# Those of both policies that leave everything where it is
IN_PLACE = {*(AUTO[name] for name in ("cutout", "equalize", "color", "sharpness")), RAND[0], *RAND[6:]}
