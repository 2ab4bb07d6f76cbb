"""Examples of one object with named points, such as those cut out of a set with boxes; ``faces`` reads others.

Points count from the middle of the image's first pixel, as COCO's do. A third number says whether a point is labelled:
0 where it is missing, and whatever stands in its place then is never learned or scored.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslzoo.data.box_module import Example
from sslzoo.data.box_policies import moved
from sslzoo.data.box_scene import MEAN, Scene, flipped, resized
from sslzoo.data.box_set import BoxSet
from sslzoo.errors import UserError
from sslzoo.views.draw import key

ENLARGED = 1.25  # a crop's side by its object's (Xiao et al. 2018, sec. 2)
EYES = (("left_eye", "right_eye"), ("left_eye_center", "right_eye_center"))  # COCO's names, and the CSV's
NORMALISERS = ("box", "interocular", "image")


@dataclass
class PointSet:
    """N examples, each an object with K points in a picture.

    Attributes:
        name: the name it was loaded by.
        names: of the points; those with ``left`` and ``right`` in them swap in a mirror.
        swap: which point each becomes in a mirror.
        points: ``(N, K, 3)`` float32: x, y in pixels of the picture, and 0 for missing.
        boxes: of the objects, ``(N, 4)`` float32: x1, y1, x2, y2 from the picture's corner.
        squares: what is cut out, ``(N, 3)`` int64: left, top and side in whole pixels; they may leave the picture.
        sizes: height and width of the pictures, ``(N, 2)`` int64.
        files: where each picture is.
        picture: from an example's number to its picture ``(H, W, 3)`` uint8; from any thread.
        skipped: how many were left out, by reason.
    """

    name: str
    names: list[str]
    swap: list[int]
    points: np.ndarray
    boxes: np.ndarray
    squares: np.ndarray
    sizes: np.ndarray
    files: list[Path]
    picture: Callable[[int], np.ndarray]
    skipped: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, rows: np.ndarray) -> "PointSet":
        """The set of these examples only, in this order."""
        places = np.asarray(rows, np.int64).tolist()
        return replace(
            self,
            **{column: getattr(self, column)[places] for column in ("points", "boxes", "squares", "sizes")},
            files=[self.files[k] for k in places],
            picture=lambda i: self.picture(places[i]),
        )

    def normalisers(self, kind: str) -> np.ndarray:
        """By what the distances of each example are divided, ``(N,)`` float64; NaN where that is unknown.

        Args:
            kind: ``box``, the root of the object's box's area; ``image``, that of the picture; ``interocular``, the
                distance between the eyes' points.

        Raises:
            UserError: on another kind, or a set without eyes.
        """
        if kind not in NORMALISERS:
            raise UserError(f"task.normalise={kind} is none of {', '.join(NORMALISERS)}")
        if kind == "box":
            return np.sqrt((self.boxes[:, 2:] - self.boxes[:, :2]).astype(float).prod(1))
        if kind == "image":
            return np.sqrt(self.sizes.astype(float).prod(1))
        return eye_distances(self.points, self.names, self.name)


def eye_distances(points: np.ndarray, names: Sequence[str], of: str) -> np.ndarray:
    """Distance between the eyes of each object, ``(N, K, 3) -> (N,)`` float64; NaN where one is missing, or none.

    Raises:
        UserError: if no points are eyes.
    """
    pair = next((pair for pair in EYES if set(pair) <= set(names)), None)
    if pair is None:
        raise UserError(f"task.normalise=interocular needs eyes, but the points of data={of} are {', '.join(names)}")
    left, right = (points[:, names.index(eye)].astype(float) for eye in pair)
    apart = np.hypot(*(left - right)[:, :2].T)
    return np.where((left[:, 2] > 0) & (right[:, 2] > 0) & (apart > 0), apart, np.nan)


# From a set with boxes


def objects(images: BoxSet) -> PointSet:
    """One example for each object with a labelled point: the square around its box, 1.25 times as large; no crowds."""
    rows = np.flatnonzero((images.keypoints[..., 2] > 0).any(1) & ~images.crowd)
    image = np.repeat(np.arange(len(images)), np.diff(images.starts))[rows]
    boxes = images.xywh[rows].copy()
    boxes[:, 2:] += boxes[:, :2]
    return PointSet(
        name=images.name,
        names=images.keypoint_names,
        swap=images.swap,
        points=images.keypoints[rows],
        boxes=boxes.astype(np.float32),
        squares=squares_around(boxes, ENLARGED),
        sizes=images.sizes[image],
        files=[images.files[k] for k in image.tolist()],
        picture=lambda i: images.picture(int(image[i])),
        skipped=images.skipped,
    )


def squares_around(boxes: np.ndarray, factor: float) -> np.ndarray:
    """Squares about the middles of boxes ``(N, 4)``, ``factor`` times their longer sides: ``(N, 3)`` int64."""
    sides = np.ceil(factor * (boxes[:, 2:] - boxes[:, :2]).max(1)).clip(1)
    corners = (boxes[:, :2] + boxes[:, 2:]) / 2 - sides[:, None] / 2
    return np.column_stack([corners.round(), sides]).astype(np.int64)


# Examples


def point_example(
    examples: PointSet,
    size: int,
    seed: int = 0,
    flip: bool = True,
    scale: float = 0.0,
    shift: float = 0.0,
    rotate: float = 0.0,
) -> Example:
    """What an object looks like in an epoch, and its ``points`` ``(K, 3)`` in pixels of that: for ``BoxLoader``.

    Points that are missing, or not in the view, are 0, 0, 0.

    Args:
        examples: the set.
        size: side of the views in pixels.
        seed: of all draws.
        flip: mirror every other view.
        scale: cut out a square of up to so much more or less, e.g. 0.3 for 0.7 to 1.3 times its side.
        shift: move it by up to so much of its side, either way.
        rotate: turn the view by up to so many degrees, either way.

    Raises:
        UserError: on numbers that mean nothing.
    """
    for name, value, most in (("scale", scale, 0.9), ("shift", shift, 1.0), ("rotate", rotate, 180.0)):
        if not 0 <= value <= most:
            raise UserError(f"task.{name}={value} is not from 0 to {most:g}; set it to one of these")
    if not 8 <= size <= 4096:
        raise UserError(f"task.size={size} is not from 8 to 4096 pixels; set it to one of these")

    def example(row: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng(key(seed, epoch, row))
        left, top, side = examples.squares[row].astype(float)
        new = side * rng.uniform(1 - scale, 1 + scale)
        left, top = (at + (side - new) / 2 + side * rng.uniform(-shift, shift) for at in (left, top))
        square = round(left), round(top), max(1, round(new))
        scene = _view(examples, row, square, size)
        if rng.random() < 0.5 and flip:
            scene = flipped(scene, examples.swap)
        if rotate:
            scene = moved(scene, angle=rng.uniform(-rotate, rotate))
        x, y, labelled = scene.points[0].unbind(-1)
        inside = (x >= 0) & (x < size) & (y >= 0) & (y < size) & (labelled > 0)
        points = torch.stack([x - 0.5, y - 0.5, labelled], dim=-1)
        return scene.pixels, {"points": torch.where(inside[:, None], points, torch.zeros(()))}

    return example


def clean_view(examples: PointSet, row: int, size: int) -> Tensor:
    """An example as it is, ``(3, size, size)`` uint8."""
    return _view(examples, row, examples.squares[row].tolist(), size).pixels


def in_picture(examples: PointSet, rows: np.ndarray, places: Tensor, size: int) -> Tensor:
    """Places in clean views ``(n, K, 2)`` in pixels of their pictures, likewise from the middle of the first pixel."""
    square = torch.from_numpy(examples.squares[rows]).to(places)  # (n, 3)
    return (places + 0.5) * (square[:, 2:, None] / size) + square[:, None, :2] - 0.5


def _view(examples: PointSet, row: int, square: Sequence[int], size: int) -> Scene:
    """The square of left, top and side as an image of ``size`` pixels, with one object; black once normalised around
    the picture."""
    left, top, side = square
    picture = torch.from_numpy(np.ascontiguousarray(examples.picture(row).transpose(2, 0, 1)))
    height, width = picture.shape[1:]
    pixels = torch.tensor(MEAN, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    if x2 > x1 and y2 > y1:
        pixels[:, y1 - top : y2 - top, x1 - left : x2 - left] = picture[:, y1:y2, x1:x2]
    points = torch.from_numpy(examples.points[row].copy())[None]  # (1, K, 3)
    points[..., :2] += 0.5 - torch.tensor([left, top], dtype=torch.float32)
    whole = torch.tensor([[0.0, 0.0, side, side]])
    return resized(Scene(pixels, whole, None, points, torch.zeros(1, dtype=torch.long), torch.ones(1)), size / side)
