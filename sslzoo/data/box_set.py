"""Images with boxes around their objects, as columns: no Python object per annotation once a set is read."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslzoo.data.decode import decode
from sslzoo.errors import UserError

IGNORE = 255  # in a class map: PASCAL's void, and COCO's crowds


@dataclass
class BoxSet:
    """N images with M objects of C classes; the objects of image i are rows ``starts[i]`` to ``starts[i + 1]``.

    Attributes:
        name: the name it was loaded by.
        classes: names of the labels 1, ..., C; label 0 is the background, as in torchvision.
        category_ids: what the annotation file calls these classes, e.g. COCO's 1 to 90 with gaps.
        image_ids: what the annotation file calls the images.
        files: one picture an image.
        sizes: height and width of the images as annotated, ``(N, 2)`` int64.
        starts: ``(N + 1,)`` int64.
        xywh: left, top, width and height in pixels from the corner of the image, ``(M, 4)`` float64.
        labels: ``(M,)`` int64, 1 to C.
        areas: ``(M,)`` float64, of the mask where there is one, as COCO measures small and large.
        crowd: ``(M,)`` bool. Groups of objects: scoring ignores what lies in them, training leaves them out.
        difficult: ``(M,)`` bool, PASCAL's mark of what scoring ignores.
        segmentations: M masks in COCO's forms, polygons or run lengths; None where unread.
        keypoints: ``(M, K, 3)`` float32: x, y, and 0 for absent, 1 for hidden, 2 for visible; None without any.
        keypoint_names: K names; those with ``left`` and ``right`` in them swap in a mirror.
        class_maps, object_maps: PASCAL's pictures of classes and of objects, None for an image without; else None.
        skipped: how many boxes or images were left out, by reason, under ``data.on_error=skip``.
    """

    name: str
    classes: list[str]
    category_ids: list[int]
    image_ids: list[int | str]
    files: list[Path]
    sizes: np.ndarray
    starts: np.ndarray
    xywh: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    segmentations: list | None = None
    keypoints: np.ndarray | None = None
    keypoint_names: list[str] = field(default_factory=list)
    class_maps: list[Path | None] | None = None
    object_maps: list[Path | None] | None = None
    skipped: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def map_classes(self) -> list[str]:
        """Names of the classes of a class map: background, and the objects'."""
        return ["background", *self.classes]

    def rows(self, i: int) -> slice:
        """The objects of image i."""
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    def read(self, i: int, with_masks: bool = False, with_keypoints: bool = False) -> tuple[np.ndarray, dict]:
        """Image i, ``(H, W, 3)`` uint8, and its target; from any thread.

        Raises:
            UserError: if the picture is damaged, or is not as large as its annotations say.
        """
        return self.picture(i), self.target(i, with_masks, with_keypoints)

    def picture(self, i: int) -> np.ndarray:
        """Image i, ``(H, W, 3)`` uint8, as it was annotated.

        Annotations count the pixels as the file stores them, as pycocotools and torchvision do. Only where the
        stored picture has not the annotated size, but has it after the camera's EXIF rotation, is it rotated.
        """
        size = tuple(self.sizes[i].tolist())
        stored = decode(self.files[i], upright=False)
        if stored.shape[:2] == size:
            return stored
        if stored.shape[1::-1] == size:
            rotated = decode(self.files[i])
            if rotated.shape[:2] == size:
                return rotated
        (height, width), (h, w) = size, stored.shape[:2]
        raise UserError(
            f"{self.files[i]} has {w} x {h} pixels, but image {self.image_ids[i]} is annotated with {width} x {height};"
            " give the picture that was annotated"
        )

    def target(self, i: int, with_masks: bool = False, with_keypoints: bool = False) -> dict:
        """What is annotated in image i, n objects.

        Returns:
            ``boxes`` (n, 4) float32: x1, y1, x2, y2. ``labels`` (n,) int64. ``area`` (n,) float32. ``iscrowd`` and
            ``difficult`` (n,) bool. ``image_id`` as in the annotation file. On request ``masks`` (n, H, W) uint8 and
            ``keypoints`` (n, K, 3) float32.
        """
        rows = self.rows(i)
        boxes = self.xywh[rows].copy()
        boxes[:, 2:] += boxes[:, :2]
        found = {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": torch.from_numpy(self.labels[rows].copy()),
            "area": torch.from_numpy(self.areas[rows].astype(np.float32)),
            "iscrowd": torch.from_numpy(self.crowd[rows].copy()),
            "difficult": torch.from_numpy(self.difficult[rows].copy()),
            "image_id": self.image_ids[i],
        }
        if with_masks:
            found["masks"] = torch.from_numpy(self._masks(i))
        if with_keypoints:
            if self.keypoints is None:
                raise UserError(f"data={self.name} has no keypoints; train on boxes or masks, or take another set")
            found["keypoints"] = torch.from_numpy(self.keypoints[rows].copy())
        return found

    def run_lengths(self, i: int) -> list[dict]:
        """The masks of image i, compressed as COCO does: size and counts."""
        from faster_coco_eval.core import mask  # a second to import, which boxes alone need not wait for

        height, width = self.sizes[i].tolist()
        if self.segmentations is not None:
            return [mask.segmToRle(shape, width, height) for shape in self.segmentations[self.rows(i)]]
        if self.object_maps is not None:
            return [mask.encode(np.asfortranarray(one)) for one in self._masks(i)]
        raise UserError(f"the masks of data={self.name} were not read; load them with masks=True")

    def _masks(self, i: int) -> np.ndarray:
        """``(n, H, W)`` uint8."""
        from faster_coco_eval.core import mask

        height, width = self.sizes[i].tolist()
        if self.object_maps is not None:
            objects = self._indices(self.object_maps, i)
            numbers = np.arange(1, self.starts[i + 1] - self.starts[i] + 1)
            return (objects == numbers[:, None, None]).astype(np.uint8)
        shapes = self.run_lengths(i)
        if not shapes:
            return np.zeros((0, height, width), np.uint8)
        return np.ascontiguousarray(mask.decode(shapes).transpose(2, 0, 1))

    def class_map(self, i: int) -> Tensor:
        """The class of every pixel of image i, ``(H, W)`` int64: 0 is background, 255 is not to be scored.

        From masks: a smaller object lies over a larger one, crowds are ignored.
        """
        if self.class_maps is not None:
            painted = self._indices(self.class_maps, i).astype(np.int64)
            drawn = (painted > 0) & (painted < IGNORE)
            if self.classes == ["object"]:
                painted[drawn] = 1
            elif (painted[drawn] > len(self.classes)).any():
                raise UserError(
                    f"{self.class_maps[i]} has class {painted[drawn].max()}, but data={self.name} has "
                    f"{len(self.classes)} classes; name them all in data.classes"
                )
            return torch.from_numpy(painted)
        rows = self.rows(i)
        painted = np.zeros(self.sizes[i], np.int64)
        colours = np.where(self.crowd[rows], IGNORE, self.labels[rows])
        masks = self._masks(i).astype(bool)
        for k in np.argsort(-masks.sum((1, 2)), kind="stable"):
            painted[masks[k]] = colours[k]
        return torch.from_numpy(painted)

    def _indices(self, maps: list[Path | None], i: int) -> np.ndarray:
        """PASCAL's picture of indices into a palette, ``(H, W)`` uint8."""
        from PIL import Image

        if maps[i] is None:
            raise UserError(f"image {self.image_ids[i]} of data={self.name} has no masks; load with segmentation=True")
        try:
            with Image.open(maps[i]) as picture:
                mode, indices = picture.mode, np.asarray(picture)
        except (OSError, SyntaxError) as error:  # Pillow's for a damaged PNG
            raise UserError(f"{maps[i]} is no picture, or cut short; fetch it again") from error
        if mode not in ("P", "L") or indices.shape != tuple(self.sizes[i].tolist()):
            raise UserError(
                f"{maps[i]} is {mode} of {indices.shape[1]} x {indices.shape[0]} pixels; "
                "give a picture of palette indices as large as its photograph"
            )
        return indices

    @property
    def swap(self) -> list[int]:
        """Which keypoint each of the K becomes in a mirror."""
        return swapped(self.keypoint_names)

    def subset(self, images: np.ndarray) -> "BoxSet":
        """The set of these images only, in this order."""
        images = np.asarray(images, np.int64)
        counts = np.diff(self.starts)[images]
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        rows = np.arange(starts[-1]) + np.repeat(self.starts[images] - starts[:-1], counts)
        picked = images.tolist()

        def of(values: list | None, places: list[int]) -> list | None:
            return None if values is None else [values[k] for k in places]

        return replace(
            self,
            image_ids=of(self.image_ids, picked),
            files=of(self.files, picked),
            sizes=self.sizes[images],
            starts=starts,
            xywh=self.xywh[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
            difficult=self.difficult[rows],
            segmentations=of(self.segmentations, rows.tolist()),
            keypoints=None if self.keypoints is None else self.keypoints[rows],
            class_maps=of(self.class_maps, picked),
            object_maps=of(self.object_maps, picked),
        )

    def agnostic(self) -> "BoxSet":
        """The same set with one class, ``object``."""
        return replace(self, classes=["object"], category_ids=[1], labels=np.ones_like(self.labels))

    def unlabelled(self) -> "BoxSet":
        """The same images without objects."""
        none = np.zeros(0, np.int64)
        return replace(
            self,
            starts=np.zeros_like(self.starts),
            xywh=np.zeros((0, 4)),
            labels=none,
            areas=np.zeros(0),
            crowd=none.astype(bool),
            difficult=none.astype(bool),
            segmentations=None,
            keypoints=None,
            class_maps=None,
            object_maps=None,
        )


class Faults:
    """What is wrong with a set: raised at the first, or left out and counted.

    Attributes:
        skipped: how many were left out, by reason.
    """

    def __init__(self, on_error: str):
        if on_error not in ("raise", "skip"):
            raise UserError(f"data.on_error={on_error} is neither raise nor skip")
        self.on_error, self.skipped = on_error, Counter()

    def sound(self, bad: np.ndarray, what: str, say: Callable[[int], str]) -> np.ndarray:
        """Where ``bad`` is not; ``say`` the first one's name, what is wrong and how to fix it."""
        if bad.any():
            if self.on_error == "raise":
                raise UserError(f"{say(int(bad.argmax()))}, or pass data.on_error=skip to leave it out")
            self.skipped[what] += int(bad.sum())
        return ~bad

    def sound_boxes(self, xywh: np.ndarray, sizes: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
        """Where boxes have an area and lie in their image, up to a pixel of rounding.

        Args:
            xywh: ``(M, 4)``.
            sizes: height and width of each box's image, ``(M, 2)``.
            name: of box k, with its file.
        """
        corners = xywh[:, :2] + xywh[:, 2:]

        def box(k: int) -> str:
            return "[" + ", ".join(f"{value:g}" for value in (*xywh[k, :2], *corners[k])) + "]"

        finite = np.isfinite(xywh).all(1)
        empty = ~finite | (xywh[:, 2:] <= 0).any(1)
        sound = self.sound(
            empty, "box without an area", lambda k: f"{name(k)}: the box {box(k)} has no area (x1, y1, x2, y2); fix it"
        )
        outside = sound & ((xywh[:, :2] < -1).any(1) | (corners > sizes[:, ::-1] + 1).any(1))
        return sound & self.sound(
            outside,
            "box outside its image",
            lambda k: (
                f"{name(k)}: the box {box(k)} (x1, y1, x2, y2) lies outside its image of "
                f"{sizes[k, 1]} x {sizes[k, 0]} pixels; fix it"
            ),
        )


def gathered(images: np.ndarray, of: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objects in the order of their images.

    Args:
        images: which images stay, ``(N,)`` bool.
        of: the image each object belongs to, ``(M,)``.
        kept: which objects stay, ``(M,)`` bool.

    Returns:
        The rows of the objects that stay, by image, ``(m,)``; where each image's begin, ``(n + 1,)``.
    """
    rows = np.flatnonzero(kept & images[of]) if len(of) else np.arange(0)
    rows = rows[np.argsort(of[rows], kind="stable")]
    counts = np.bincount(of[rows], minlength=len(images))[images]
    return rows, np.concatenate([[0], counts.cumsum()]).astype(np.int64)


def swapped(names: Sequence[str]) -> list[int]:
    """Which keypoint each becomes in a mirror: that of the other side, or itself."""
    mirrored = [name.replace("left", "\0").replace("right", "left").replace("\0", "right") for name in names]
    return [names.index(other) if other in names else k for k, other in enumerate(mirrored)]


def repeats(values: Sequence[Hashable]) -> np.ndarray:
    """Where a value stands that stood before, ``(N,)`` bool."""
    first: dict[Hashable, int] = {}
    return np.array([first.setdefault(value, k) != k for k, value in enumerate(values)], bool)
