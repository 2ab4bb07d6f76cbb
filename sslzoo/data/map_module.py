"""What a segmenter learns from: squares cut out of a set's images and their class maps."""

import torch
from torch import Tensor

from sslzoo.data.box_module import Example
from sslzoo.data.box_views import STRENGTHS, augmented, twins
from sslzoo.data.maps import MapSet
from sslzoo.errors import UserError
from sslzoo.views.draw import key

SMALLEST, LARGEST = 32, 4096  # sides of a square in pixels


def map_example(images: MapSet, augment: str, size: int, seed: int = 0) -> Example:
    """What an image and its ``class_map`` look like in an epoch, for ``Boxes``: a function of (seed, epoch, row).

    Both are squares, ``(3, size, size)`` and ``(size, size)`` uint8; the map is 255 where the image does not reach.

    Args:
        images: the set.
        augment: one of ``box_views.STRENGTHS``.
        size: side of the squares in pixels.
        seed: of all draws.

    Raises:
        UserError: on an unknown augmentation, or squares that are too small, or larger than images ever become.
    """
    check_squares(images, augment, size)

    def example(row: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        target = {"boxes": torch.zeros(0, 4), "class_map": images.class_map(row).to(torch.uint8)}
        pixels, target = augmented(images.picture(row), target, augment, size, key(seed, epoch, row))
        return pixels, {"class_map": target["class_map"]}

    return example


def map_twin_example(images: MapSet, augment: str, size: int, seed: int = 0) -> Example:
    """A square of an image as a teacher and as its student see it, in the same pixels; class maps are not looked at.

    The image is the student's, see ``box_views.twins``. The target holds the teacher's, ``clean`` (3, size, size)
    uint8, and ``outside`` (size, size) bool, where the image does not reach.

    Args:
        images, augment, size, seed: see ``map_example``, as what is raised.
    """
    check_squares(images, augment, size)

    def example(row: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        clean, distorted, outside = twins(images.picture(row), augment, size, key(seed, epoch, row))
        return distorted, {"clean": clean, "outside": outside}

    return example


def check_squares(images: MapSet, augment: str, size: int) -> None:
    """Refuse, by UserError, an unknown augmentation and squares that images never fill."""
    if augment not in STRENGTHS:
        raise UserError(f"task.augment={augment} is none of {', '.join(STRENGTHS)}")
    strength, longest = STRENGTHS[augment], int(images.sizes.max())
    most = LARGEST if strength.of_crop else min(LARGEST, int(strength.scale[1] * longest))
    if not SMALLEST <= size <= most:
        raise UserError(
            f"task.size={size} is not from {SMALLEST} to {most}, the squares that task.augment={augment} cuts out of"
            f" images of at most {longest} pixels; set it to one of these"
        )
