"""What AutoAugment and RandAugment do to an image with boxes: operations, and which of them an image gets.

AutoAugment for detection (Zoph et al. 2019, 1906.11172, policy v0) and RandAugment (Cubuk et al. 2020, 1909.13719).
Distances of AutoAugment, in the paper pixels of images of about 640, are relative to the longer side here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from sslzoo.data.box_scene import Scene, clipped
from sslzoo.data.box_set import IGNORE

GRAY = 128.0  # what AutoAugment's operations uncover
AUTOAUGMENT = (  # policy v0: operation, probability, level of 10
    (("translate_x", 0.6, 4), ("equalize", 0.8, 10)),
    (("translate_y_in_boxes", 0.2, 2), ("cutout", 0.8, 8)),
    (("sharpness", 0.0, 8), ("shear_x", 0.4, 0)),
    (("shear_y", 1.0, 2), ("translate_y_in_boxes", 0.6, 6)),
    (("rotate", 0.6, 10), ("color", 1.0, 6)),
)
RANDAUGMENT = (1, 5)  # operations, and their level of 10: the paper's for COCO

Operation = Callable[[Scene, float, np.random.Generator], Scene]  # of a scene, a level of 0 to 1, random draws


def drawn(policy: str | None, rng: np.random.Generator) -> Iterator[tuple[Operation, float]]:
    """The operations of a policy for one image, and their levels; each draws its own before the next is drawn."""
    if policy == "autoaugment":
        for name, p, level in AUTOAUGMENT[rng.integers(len(AUTOAUGMENT))]:
            if rng.random() < p:
                yield AUTO[name], level / 10
    elif policy == "randaugment":
        count, level = RANDAUGMENT
        for k in rng.integers(len(RAND), size=count):
            yield RAND[k], level / 10


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
    return clipped(replace(scene, pixels=pixels, boxes=boxes, masks=masks, points=points, classes=classes))


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
