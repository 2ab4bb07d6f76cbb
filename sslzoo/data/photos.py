"""The default set: patches of ten colour photographs inside the scikit-image and scikit-learn wheels.

Nothing is downloaded. A patch's label is the photograph it was cut from. Patches differ in scale by a factor
of two and have an exposure and a colour cast each, as if many cameras had taken them: neither pixels that
line up nor the mean colour give a photograph away.

Training and validation share no source pixel. A lattice of square cells covers each photograph, and one cell
in five, a knight's move apart, is held out: validation patches lie inside such a cell, training patches in
none.
"""

from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sslzoo.data.decode import decode
from sslzoo.errors import UserError

PHOTOS = {  # class: (package, file in it); pictures under free licences, see the packages' own notes
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}

CELL = 48  # pixels of the source; at least the largest side, so that a validation patch fits into one cell
SIDES = (24, 48)  # of a patch in the source, drawn uniformly in the logarithm
EXPOSURE = 0.4  # a patch is made brighter or darker by up to this, in the logarithm
CAST = 0.3  # and so is each of its channels
FLAT = 8.0  # least standard deviation of the gray levels in a box: no black sky, no plain backdrop
DRAWS = 4096  # boxes drawn at a time


class Patches(NamedTuple):
    """Patches of all photographs; row i belongs to class i modulo the number of photographs."""

    images: np.ndarray  # (N, size, size, 3) uint8
    labels: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) int64: left, top, right, bottom in the source photograph


def read_photos() -> list[np.ndarray]:
    """Read the photographs in the order of ``PHOTOS``, each (H, W, 3) uint8, from the packages' own files."""
    return [decode(_package_folder(package) / file) for package, file in PHOTOS.values()]


def _package_folder(package: str) -> Path:
    """Where a package is installed. It is not imported: skimage.data may download, sklearn takes a second."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package} holds photos but is missing; type: pip install scikit-image scikit-learn")
    return Path(spec.origin).parent


def held_out(height: int, width: int) -> np.ndarray:
    """Mask (height, width) of the pixels that belong to validation."""
    row = np.arange(height)[:, None] // CELL
    column = np.arange(width)[None] // CELL
    return (row + 2 * column) % 5 == 0


def cut(photos: list[np.ndarray], count: int, validation: bool, size: int = 32, seed: int = 0) -> Patches:
    """Cut ``count`` patches, as many from each photograph as from the next, from one side of the split.

    Parameters
    ----------
    photos : list of np.ndarray of shape (H, W, 3), uint8
    count : int
        Patches in all. The first rows are the same whatever the count.
    validation : bool
        Cut from the held-out cells, else from everything but them.
    size : int
        Side of the patches returned, in pixels.
    seed : int
        Decides boxes, exposures and casts, with the photograph and the side of the split.

    Returns
    -------
    Patches
    """
    images = np.empty((count, size, size, 3), np.uint8)
    boxes = np.empty((count, 4), np.int64)
    for label, photo in enumerate(photos):
        rows = range(count)[label :: len(photos)]
        for_boxes, for_gains = np.random.default_rng([seed, label, validation]).spawn(2)
        boxes[rows] = _boxes(photo, len(rows), validation, for_boxes)
        images[rows] = _develop(photo, boxes[rows], size, for_gains)
    return Patches(images, np.arange(count) % len(photos), boxes)


def _boxes(photo: np.ndarray, count: int, validation: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw boxes (count, 4) on one side of the split that are not flat."""
    height, width, _ = photo.shape
    gray = photo @ np.array([0.299, 0.587, 0.114])
    held, light, square = map(_summed, (held_out(height, width), gray, gray**2))
    found = np.empty((0, 4), np.int64)
    while len(found) < count:
        side = np.exp(rng.uniform(log(SIDES[0]), log(SIDES[1]), DRAWS)).astype(np.int64)
        left, top = rng.integers(0, width - side + 1), rng.integers(0, height - side + 1)
        box = np.stack([left, top, left + side, top + side], axis=1)
        area = side**2
        fits = _inside(held, box) == (area if validation else 0)
        variance = _inside(square, box) / area - (_inside(light, box) / area) ** 2
        found = np.concatenate([found, box[fits & (variance >= FLAT**2)]])
    return found[:count]


def _develop(photo: np.ndarray, boxes: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut the boxes (n, 4) out, resize them, and give each a light of its own: (n, size, size, 3) uint8."""
    picture = Image.fromarray(photo)
    # Cropped first: resize(box=...) would let the filter's support reach over the edge of the box.
    patches = [picture.crop(box).resize((size, size), Image.Resampling.BICUBIC) for box in boxes.tolist()]
    draws = rng.uniform(-1, 1, (len(boxes), 4))
    gains = np.exp(EXPOSURE * draws[:, :1] + CAST * draws[:, 1:])[:, None, None]  # (n, 1, 1, 3)
    return (np.stack([np.asarray(patch) for patch in patches]) * gains).round().clip(0, 255).astype(np.uint8)


def _summed(values: np.ndarray) -> np.ndarray:
    """Summed-area table (H + 1, W + 1) of values (H, W): entry (y, x) sums all above y and left of x."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    table[1:, 1:] = values.cumsum(0).cumsum(1)
    return table


def _inside(table: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Sums over boxes (n, 4) from their four corners in a summed-area table."""
    left, top, right, bottom = boxes.T
    return table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
