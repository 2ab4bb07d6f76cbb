"""Sets of images with a class for every pixel, by name: those with masks, and Cityscapes."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from sslzoo.data import boxes
from sslzoo.data.box_set import IGNORE
from sslzoo.data.cityscapes import read_cityscapes
from sslzoo.errors import UserError

NAMES = (*boxes.NAMES, "cityscapes")


class MapSet(Protocol):
    """N images and their class maps: what learning and scoring pixels ask of a set. ``BoxSet`` is one.

    Attributes:
        name: the name it was loaded by.
        map_classes: names of the classes 0, ..., K - 1; 255 in a class map is not to be learned or scored.
        image_ids: what the set calls its images.
        files: one picture an image.
        sizes: height and width, ``(N, 2)`` int64.
        skipped: how many images or objects were left out, by reason.
    """

    name: str
    image_ids: list[int | str]
    files: list[Path]
    sizes: np.ndarray
    skipped: Counter

    @property
    def map_classes(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def picture(self, i: int) -> np.ndarray:
        """Image i, ``(H, W, 3)`` uint8."""

    def class_map(self, i: int) -> Tensor:
        """The class of every pixel of image i, ``(H, W)``."""


def load_maps(settings: Mapping, seed: int = 0) -> tuple[MapSet, MapSet]:
    """The training and the held-out set that ``settings`` of ``conf/data`` describe.

    Args:
        settings: ``name``, ``root`` and what else ``load_boxes`` or ``read_cityscapes`` takes; the rest is left.
        seed: of the choice of ``label_fraction``.

    Raises:
        UserError: if it is no set with masks, or it is missing or faulty.
    """
    name = settings["name"]
    if name not in NAMES:
        raise UserError(f"data={name} has no masks; choose one of data={', data='.join(NAMES)}")
    if name == "cityscapes":
        train, val = (read_cityscapes(settings["root"], split, settings["on_error"]) for split in ("train", "val"))
        return train.subset(boxes.labelled_images(len(train), settings["label_fraction"], seed)), val
    train, val = boxes.load_boxes(**boxes.chosen(settings), masks=True, segmentation=True, seed=seed)
    if len(train.map_classes) > IGNORE:
        raise UserError(f"data={name} has {len(train.classes)} classes, and class maps hold at most {IGNORE - 1}")
    return train, val


def load_unlabelled_maps(settings: Mapping, seed: int = 0) -> MapSet:
    """The images that self-training may label.

    Args:
        settings, seed: see ``load_maps``; what its ``label_fraction`` leaves of the training images is here, and
            unlabeled2017 where there is one.

    Raises:
        UserError: if there are none.
    """
    if settings["name"] != "cityscapes":
        return boxes.load_unlabelled(**boxes.chosen(settings), segmentation=True, seed=seed)
    train = read_cityscapes(settings["root"], "train", settings["on_error"])
    used = boxes.labelled_images(len(train), settings["label_fraction"], seed)
    rest = np.setdiff1d(np.arange(len(train)), used)
    if not len(rest):
        raise UserError("data=cityscapes has no unlabelled images; pass data.label_fraction below 1")
    return train.subset(rest)


def held_back_maps(settings: Mapping, seed: int = 0) -> list[MapSet]:
    """Sets with the true maps of some images of ``load_unlabelled_maps``: to judge labels by, never to train on."""
    if settings["name"] == "cityscapes":
        return [load_unlabelled_maps(settings, seed)]
    return boxes.held_back(**boxes.chosen(settings), masks=True, segmentation=True, seed=seed)
