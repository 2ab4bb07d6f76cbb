"""Augmentation of images together with boxes, masks, keypoints and class maps: Augment-S1 to S4 of Zoph et al. 2020
(2006.06882).

S1 flips, scales by 0.8 to 1.2 and crops. S2 puts AutoAugment before that, see ``box_policies``. S3 scales by 0.5 to 2.
S4 scales likewise, after RandAugment instead. These scales are relative to the crop. ``own_scale`` flips, scales by 0.5
to 2 of the image's own size and crops, as FCNs are trained (He et al. 2020, 1911.05722, appendix).

What happens is a pure function of the key, so ``sslzoo.views.draw.key(seed, epoch, index)`` repeats it anywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslzoo.data.box_policies import IN_PLACE, drawn
from sslzoo.data.box_scene import Scene, cropped, flipped, resized, scene_of, target_of
from sslzoo.data.box_set import IGNORE
from sslzoo.errors import UserError


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
    scene = scene_of(image, target)
    for operation, level in drawn(STRENGTHS[strength].policy, rng):
        scene = operation(scene, level, rng)
    scene = _placed(scene, STRENGTHS[strength], size, rng, swap)
    return scene.pixels, target_of(scene, target)


def twins(image: np.ndarray, strength: str = "s1", size: int = 512, key: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One random view of an image twice, as it is and distorted; everything is at the same place in both.

    It is flipped, scaled and cropped as ``strength`` says, then one copy goes through the operations of its policy that
    leave everything where it is: colours and cutout. Those that move something are left out where they are drawn.

    Args:
        image, strength, size, key: see ``augmented``.

    Returns:
        Both views, ``(3, size, size)`` uint8, one tensor where nothing was distorted; and where the image does not
        reach, ``(size, size)`` bool.
    """
    rng = np.random.default_rng(key)
    nothing = {"boxes": torch.zeros(0, 4), "class_map": torch.zeros(image.shape[:2], dtype=torch.uint8)}
    clean = scene = _placed(scene_of(image, nothing), STRENGTHS[strength], size, rng)
    for operation, level in drawn(STRENGTHS[strength].policy, rng):
        if operation in IN_PLACE:
            scene = operation(scene, level, rng)
    return clean.pixels, scene.pixels, clean.classes == IGNORE


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
    scene = scene_of(image, target)
    if np.random.default_rng(key).random() < 0.5:
        scene = flipped(scene, swap)
    return scene.pixels, target_of(scene, target)
