"""What a teacher says of the pixels of unlabelled images, kept as PNG masks."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslzoo.data.box_set import IGNORE
from sslzoo.data.maps import MapSet
from sslzoo.errors import UserError


@dataclass
class PseudoMaps:
    """Unlabelled images with a teacher's class maps; a ``MapSet``.

    Attributes:
        images: N images without labels.
        maps: a PNG of class numbers each, 255 where the teacher is unsure.
    """

    images: MapSet
    maps: list[Path]

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def map_classes(self) -> list[str]:
        return self.images.map_classes

    @property
    def image_ids(self) -> list[int | str]:
        return self.images.image_ids

    @property
    def files(self) -> list[Path]:
        return self.images.files

    @property
    def sizes(self) -> np.ndarray:
        return self.images.sizes

    @property
    def skipped(self) -> Counter:
        return self.images.skipped

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, i: int) -> np.ndarray:
        """Image i, ``(H, W, 3)`` uint8."""
        return self.images.picture(i)

    def class_map(self, i: int) -> Tensor:
        """What the teacher takes every pixel of image i for, ``(H, W)`` uint8, 255 where it is unsure.

        Raises:
            UserError: if the file is damaged, or of another image or other classes.
        """
        try:
            with Image.open(self.maps[i]) as picture:
                mode, values = picture.mode, np.array(picture)
        except (OSError, SyntaxError) as error:  # Pillow's for a damaged PNG
            raise UserError(f"{self.maps[i]} is no picture, or cut short; label again") from error
        known = values[values != IGNORE]
        if mode not in ("P", "L") or values.shape != tuple(self.sizes[i].tolist()):
            raise UserError(f"{self.maps[i]} is no class map of {self.files[i]}; label again")
        if len(known) and known.max() >= len(self.map_classes):
            raise UserError(
                f"{self.maps[i]} has class {known.max()}, but data={self.name} has {len(self.map_classes)} classes;"
                " label again"
            )
        return torch.from_numpy(values)

    @classmethod
    def read(cls, folder: str | Path, images: MapSet) -> "PseudoMaps":
        """The images of the unlabelled set ``images`` that have a map ``IMAGE.png`` in ``folder``.

        Raises:
            UserError: if there is no such folder, or it has none.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"pseudo-labels {folder} are no folder; task=selftrain writes them to RUN/pseudo/maps")
        files = [folder / f"{name}.png" for name in images.image_ids]
        rows = np.flatnonzero([file.is_file() for file in files])
        if not len(rows):
            raise UserError(f"{folder} has no class map of an unlabelled image of data={images.name}; label again")
        return cls(images.subset(rows), [files[row] for row in rows])
