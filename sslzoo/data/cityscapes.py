"""Cityscapes (Cordts et al. 2016, arXiv 1604.01685): street scenes, and class maps of their pixels.

Scores are of 19 of its 34 classes, all else is void. ``*_labelTrainIds.png``, where there are any, have these 19 as 0
to 18 and 255, ``*_labelIds.png`` have all 34.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslzoo.data.box_set import IGNORE, Faults
from sslzoo.data.decode import decode
from sslzoo.errors import UserError

CLASSES = {  # by their number among the 34
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
ALL = 34
LAYOUT = "expected leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine likewise with *_labelIds.png in data.root"


def _meaning() -> dict[str, np.ndarray]:
    """By the ending of a file's name, which class each value is, ``(256,)`` uint8, and which values are known."""
    ids = np.full(256, IGNORE, np.uint8)
    ids[list(CLASSES)] = np.arange(len(CLASSES))
    train_ids = np.full(256, IGNORE, np.uint8)
    train_ids[: len(CLASSES)] = np.arange(len(CLASSES))
    return {"labelTrainIds": train_ids, "labelIds": ids}


MEANING = _meaning()
KNOWN = {"labelTrainIds": len(CLASSES), "labelIds": ALL}  # values below this, and 255


@dataclass
class Cityscapes:
    """N images and their class maps, see ``maps.MapSet``.

    Attributes:
        image_ids: e.g. ``frankfurt_000000_000294``.
        files: photographs.
        maps: pictures of class numbers.
        sizes: height and width, ``(N, 2)`` int64.
    """

    image_ids: list[int | str]
    files: list[Path]
    maps: list[Path]
    sizes: np.ndarray
    name: str = "cityscapes"
    skipped: Counter = field(default_factory=Counter)

    @property
    def map_classes(self) -> list[str]:
        """The 19."""
        return list(CLASSES.values())

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, i: int) -> np.ndarray:
        """Image i, ``(H, W, 3)`` uint8."""
        return decode(self.files[i], upright=False)

    def class_map(self, i: int) -> Tensor:
        """The class of every pixel of image i, ``(H, W)`` uint8: 0 to 18, or 255.

        Raises:
            UserError: if its file has other classes, or is not as large as the photograph.
        """
        file = self.maps[i]
        kind = file.stem.rpartition("_")[2]
        try:
            with Image.open(file) as picture:
                mode, values = picture.mode, np.asarray(picture)
        except OSError as error:
            raise UserError(f"{file} is no picture, or cut short; fetch it again") from error
        if mode not in ("P", "L") or values.shape != tuple(self.sizes[i].tolist()):
            raise UserError(
                f"{file} is {mode} of {values.shape[1]} x {values.shape[0]} pixels;"
                " give a picture of class numbers as large as its photograph"
            )
        unknown = values[(values >= KNOWN[kind]) & (values != IGNORE)]
        if len(unknown):
            raise UserError(
                f"{file} has class {unknown.max()}, but {kind} go from 0 to {KNOWN[kind] - 1}, and 255; fix it"
            )
        return torch.from_numpy(MEANING[kind][values])

    def subset(self, images: np.ndarray) -> "Cityscapes":
        """The set of these images only, in this order."""
        picked = np.asarray(images, np.int64).tolist()
        ids, files, maps = ([each[k] for k in picked] for each in (self.image_ids, self.files, self.maps))
        return replace(self, image_ids=ids, files=files, maps=maps, sizes=self.sizes[picked])


def read_cityscapes(root: str | Path | None, split: str, on_error: str = "raise") -> Cityscapes:
    """Find the images of a split with their maps.

    Args:
        root: of ``leftImg8bit`` and ``gtFine``.
        split: ``train`` or ``val``.
        on_error: ``raise`` at the first photograph without a map, or ``skip`` and count them.

    Raises:
        UserError: if there are none, or on such a photograph.
    """
    if root is None:
        raise UserError("data.root is null, but data=cityscapes needs a folder; pass data.root=PATH")
    top = Path(root).expanduser()
    ending = "_leftImg8bit"
    files = sorted((top / "leftImg8bit" / split).glob(f"*/*{ending}.png"))
    if not files:
        raise UserError(f"data.root={root} has no images in leftImg8bit/{split}; {LAYOUT}")
    ids = [file.stem.removesuffix(ending) for file in files]
    maps = [_map_of(top / "gtFine" / split / file.parent.name, image) for file, image in zip(files, ids, strict=True)]
    faults = Faults(on_error)
    kept = faults.sound(
        np.array([found is None for found in maps]),
        "missing class map",
        lambda k: f"{files[k]} has no class map in gtFine/{split}/{files[k].parent.name}; put it there",
    )
    places = np.flatnonzero(kept).tolist()
    if not places:
        raise UserError(f"data.root={root} has no class maps in gtFine/{split}; {LAYOUT}")
    sizes = np.array([_size(files[k]) for k in places], np.int64)
    found = ([each[k] for k in places] for each in (ids, files, maps))
    return Cityscapes(*found, sizes=sizes, skipped=faults.skipped)


def _map_of(folder: Path, image: str) -> Path | None:
    """The class map of an image, that of the 19 classes where there is one."""
    for kind in MEANING:
        file = folder / f"{image}_gtFine_{kind}.png"
        if file.is_file():
            return file
    return None


def _size(file: Path) -> tuple[int, int]:
    """Height and width, without decoding."""
    try:
        with Image.open(file) as picture:
            return picture.height, picture.width
    except OSError as error:
        raise UserError(f"{file} is no picture; fetch it again") from error
