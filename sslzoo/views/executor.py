"""From uint8 images to float views: draw the table, then run the compiled pass over it, in threads if asked.

Whatever makes views is called alike, ``(images, index, epoch, out, pool)``: :class:`Views` for training,
:class:`Clean` for evaluation, :class:`sslzoo.views.FromTransform` for a transform from elsewhere.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from math import ceil

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sslzoo.errors import UserError
from sslzoo.views import draw, kernel
from sslzoo.views.spec import View, flat

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Images = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]

_log = logging.getLogger(__name__)
_warming = threading.Lock()
_thread = threading.local()  # one set of scratch planes a thread: fresh pages would cost more than the pass


class Views:
    """uint8 images in, V float tensors out; a pure function of (seed, epoch, index, view).

    ``views`` is a recipe, ``mean`` and ``std`` normalise values in 0..1. The first object made on a machine
    compiles the kernel, which is then kept on disk.
    """

    def __init__(
        self,
        views: Sequence[View],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
    ):
        self.views = flat(views)
        self.sizes = [view.size for view in self.views]
        self.count = len(self.views)
        self.seed = seed
        self._colour = _colour(mean, std)
        self._plans = _plans(self.views)
        self._margins = [_margin(view) for view in self.views]
        warm()

    def buffers(self, batch: int, pin: bool = False) -> list[Tensor]:
        """Make V tensors (batch, 3, S, S), float32, channels last, to be passed as ``out`` again and again.

        Reusing them spares the first touch of fresh memory; ``pin`` (needs CUDA) speeds up copies to a GPU.
        """
        return [_buffer(batch, size, pin) for size in self.sizes]

    def table(self, images: Images, index: ArrayLike, epoch: int) -> NDArray[np.void]:
        """Draw what :meth:`__call__` will do to each view of each image: (B, V), dtype ``draw.DRAW``."""
        heights, widths = _shapes(images)
        return draw.table(self.views, self.seed, epoch, index, heights, widths)

    def render(
        self,
        images: Images,
        table: NDArray[np.void],
        out: list[Tensor] | None = None,
        pool: Executor | None = None,
    ) -> list[Tensor]:
        """Do what ``table`` (B, V) says, drawn by :meth:`table` or edited by hand: V x (B, 3, S, S).

        Raises ``ValueError`` for a crop box that leaves its image. A hand-set sigma reaches no further than
        the recipe's widest blur.
        """
        batch = len(images)
        _check_boxes(table, *_shapes(images))
        out = self.buffers(batch) if out is None else [buffer[:batch] for buffer in out]
        _render(images, table, self._plans, self._colour, self._margins, out, pool)
        return out

    def __call__(
        self,
        images: Images,
        index: ArrayLike,
        epoch: int,
        out: list[Tensor] | None = None,
        pool: Executor | None = None,
    ) -> list[Tensor]:
        """Make the views of a batch: V x (B, 3, S, S), float32, channels last.

        ``images`` is one uint8 array (B, H, W, 3) or a list of B arrays (H, W, 3) of any sizes; ``index``
        (B,) their positions in the training set. ``out`` are buffers to fill, of at least B rows. With a
        ``pool`` of threads the batch is cut into parts that run at once; the result is the same to the bit.
        """
        return self.render(images, self.table(images, index, epoch), out, pool)


class Clean:
    """The evaluation view: short side to ``resize``, centre crop of ``size``, normalise, in one pass.

    ``resize`` defaults to round(size * 256 / 224) for images larger than ``size`` and to ``size`` for others,
    so that an image of exactly ``size`` is only normalised. It is torchvision's Resize and CenterCrop, with
    their rounding of the long side and of the crop's corner: the crop is a box of the image whose sides need
    not be whole, and its middle pixels are those the two steps would make, but for their rounding to uint8.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        resize: int | None = None,
        interpolation: str = "bilinear",
    ):
        if resize is not None and resize < size:
            raise UserError(f"resize is {resize}, smaller than the crop; give at least size, {size}")
        self.size, self.resize = size, resize
        self.settings = (size, resize, interpolation, tuple(mean), tuple(std))
        self._colour = _colour(mean, std)
        self._plans = _plans([View(size, interpolation=interpolation)])
        self._plans["inside"] = 0
        warm()

    def buffers(self, batch: int, pin: bool = False) -> Tensor:
        """Make a tensor (batch, 3, size, size), float32, channels last, to be passed as ``out``."""
        return _buffer(batch, self.size, pin)

    def __call__(
        self,
        images: Images,
        index: ArrayLike | None = None,
        epoch: int = 0,
        out: Tensor | None = None,
        pool: Executor | None = None,
    ) -> Tensor:
        """Make the clean view of a batch: (B, 3, size, size). ``index`` and ``epoch`` change nothing."""
        heights, widths = _shapes(images)
        table = np.zeros((len(heights), 1), draw.DRAW)
        table["brightness"] = table["contrast"] = table["saturation"] = 1
        for row, height, width in zip(table[:, 0], heights, widths, strict=True):
            row["top"], row["left"], row["height"], row["width"] = self._box(int(height), int(width))
        out = self.buffers(len(table)) if out is None else out[: len(table)]
        _render(images, table, self._plans, self._colour, [0], [out], pool)
        return out

    def _box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Where the centre crop of the resized image lies in the image itself: top, left, height, width."""
        short, long = sorted((height, width))
        resize = self.resize or (round(self.size * 256 / 224) if short > self.size else self.size)
        sides = {short: resize, long: int(resize * long / short)} if short < long else {short: resize}
        tall, wide = sides[height], sides[width]
        top, left = round((tall - self.size) / 2), round((wide - self.size) / 2)
        y, x = height / tall, width / wide
        return top * y, left * x, self.size * y, self.size * x


def warm() -> None:
    """Compile the kernel, or load it from Numba's cache on disk, saying so if that takes a while."""
    with _warming:
        if kernel.render.signatures:
            return
        note = threading.Timer(4, _log.warning, ["compiling the views kernel once (about 15 s)"])
        note.start()
        try:
            view = [View(1)]
            table = draw.table(view, 0, 0, [0], 1, 1)
            pixel, buffer = np.zeros((1, 1, 1, 3), np.uint8), _buffer(1, 1, pin=False)
            _render(pixel, table, _plans(view), _colour([0], [1]), [0], [buffer], None)
        finally:
            note.cancel()


def _render(
    images: Images,
    table: NDArray[np.void],
    plans: NDArray[np.void],
    colour: NDArray[np.float32],
    margins: list[int],
    out: list[Tensor],
    pool: Executor | None,
) -> None:
    """Run the compiled pass over every view of every image, in parts if there is a pool."""
    # A stack goes through in one call a view; of images that differ in size each is a stack of its own.
    stacks = [_frozen(images)] if isinstance(images, np.ndarray) else [_frozen(image[None]) for image in images]
    stacked, batch = isinstance(images, np.ndarray), len(table)
    sizes = plans["size"].tolist()
    arrays = [_channels_last(buffer, batch, size) for buffer, size in zip(out, sizes, strict=True)]

    def run(start: int, stop: int) -> None:
        if stacked:
            parts = [(stacks[0][start:stop], slice(start, stop))]
        else:
            parts = [(stacks[b], slice(b, b + 1)) for b in range(start, stop)]
        for stack, rows in parts:
            for v, array in enumerate(arrays):
                planes = _planes(sizes[v], margins[v])
                kernel.render(stack, table[rows], plans, v, colour, planes, array[rows])

    if pool is None or batch < 2:
        run(0, batch)
        return
    step = ceil(batch / (4 * (os.cpu_count() or 1)))  # a few parts a core, to even out what they cost
    starts = range(0, batch, step)
    list(pool.map(run, starts, [min(start + step, batch) for start in starts]))


def _frozen(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The array as the kernel was compiled for it: (B, H, W, 3) uint8, contiguous, read-only."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        got = f"{images.dtype} {images.shape[1:]}"
        raise ValueError(f"an image is {got}; views take uint8 (H, W, 3), so convert it to RGB bytes first")
    images = np.ascontiguousarray(images).view()
    images.flags.writeable = False
    return images


def _check_boxes(table: NDArray[np.void], heights: NDArray[np.int64], widths: NDArray[np.int64]) -> None:
    """Refuse a crop box that is not within its image: the compiled pass does not look."""
    for start, side, length in (("top", "height", heights), ("left", "width", widths)):
        inside = (table[start] >= 0) & (table[side] >= 1) & (table[start] + table[side] <= length[:, None])
        if not inside.all():
            raise ValueError("a crop box leaves its image; table() draws boxes for these very images")


def _shapes(images: Images) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Heights and widths of a batch: (B,) each."""
    if isinstance(images, np.ndarray):
        shapes = np.broadcast_to(images.shape[1:3], (len(images), 2))
    else:
        shapes = np.array([image.shape[:2] for image in images]).reshape(-1, 2)
    return shapes[:, 0].astype(np.int64), shapes[:, 1].astype(np.int64)


def _buffer(batch: int, size: int, pin: bool) -> Tensor:
    shape = (batch, 3, size, size)
    return torch.empty(shape, dtype=torch.float32, pin_memory=pin, memory_format=torch.channels_last)


def _channels_last(buffer: Tensor, batch: int, size: int) -> NDArray[np.float32]:
    """The memory of a channels-last tensor (B, 3, S, S) as an array (B, S, S, 3)."""
    array = buffer.permute(0, 2, 3, 1).numpy()
    if array.dtype != np.float32 or array.shape != (batch, size, size, 3) or not array.flags.c_contiguous:
        need = f"float32, channels_last and {batch, 3, size, size} or longer"
        raise ValueError(f"out is {buffer.dtype} {tuple(buffer.shape)}; it must be {need}: make it with buffers()")
    return array


def _planes(size: int, margin: int) -> NDArray[np.float32]:
    """This thread's scratch: three planes of (size + 2 margin) rows."""
    shelf: dict[tuple[int, int], NDArray[np.float32]] = _thread.__dict__.setdefault("planes", {})
    if (size, margin) not in shelf:
        shelf[size, margin] = np.empty((3, (size + 2 * margin) * size), np.float32)
    return shelf[size, margin]


def _plans(views: Sequence[View]) -> NDArray[np.void]:
    plans = np.zeros(len(views), kernel.PLAN)
    for plan, view in zip(plans, views, strict=True):
        plan["size"], plan["inside"] = view.size, True
        plan["cubic"], plan["gray_first"] = view.interpolation == "bicubic", view.gray_first
        plan["kernel"] = view.blur.kernel or 0 if view.blur else 0
        plan["threshold"] = view.solarize.threshold if view.solarize else 1
    return plans


def _margin(view: View) -> int:
    """The widest radius the view's blur can take."""
    if view.blur is None:
        return 0
    return kernel.blur_radius.py_func(view.blur.sigma[1], view.blur.kernel or 0, view.size)


def _colour(mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """The factor and the offset that normalise: (2, 3)."""
    m, s = np.broadcast_to(mean, 3), np.broadcast_to(std, 3)
    return np.stack([1 / s, -m / s]).astype(np.float32)
