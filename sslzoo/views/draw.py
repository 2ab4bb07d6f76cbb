"""Random numbers without state: each is a hash of where it is needed.

What happens to image i in epoch e, view v is a pure function of (seed, e, i, v): no generator is advanced,
so batch size, order, workers, ranks and resuming cannot change it. The hash is SplitMix64's finaliser
(Steele, Lea and Flood 2014), chained over the coordinates and then read at a numbered slot per quantity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sslzoo.views.spec import Blur, Jitter, Solarize, View, flat

LAW = np.dtype(
    [(name, "f8") for name in ("scale_low", "scale_high", "log_ratio_low", "log_ratio_high", "flip")]
    + [(name, "f8") for name in ("jitter", "brightness", "contrast", "saturation", "hue", "gray")]
    + [(name, "f8") for name in ("blur", "sigma_low", "sigma_high", "solarize")]
)
"""The distributions of one view, as numbers."""

DRAW = np.dtype(
    [(name, "f8") for name in ("top", "left", "height", "width")]
    + [(name, "f4") for name in ("brightness", "contrast", "saturation", "hue", "sigma")]
    + [(name, "i4") for name in ("flip", "gray", "solarize")]
    + [("order", "i4", (4,))]
)
"""What was drawn for one view of one image: the crop box in source pixels, the jitter factors and hue shift
(1, 1, 1, 0 when jitter does not apply), the blur's sigma (0 when it does not), three yes-or-nos, and the
order of the jitter's operations, each one of BRIGHTNESS, CONTRAST, SATURATION, HUE."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# The slots at which a view's key is read. The crop owns 40: four numbers for each of its ten tries.
_TRIES = 10
_FLIP, _JITTER, _GRAY, _BLUR, _SIGMA, _SOLARIZE = range(4 * _TRIES, 4 * _TRIES + 6)
_FACTOR = 4 * _TRIES + 6
_ORDER = _FACTOR + 4

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Numba promotes uint64 with a plain int to float64, so every constant is a uint64.
_U_GOLDEN, _U_MIX_1, _U_MIX_2 = np.uint64(_GOLDEN), np.uint64(_MIX_1), np.uint64(_MIX_2)
_U11, _U27, _U30, _U31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)


@njit(nogil=True)
def _mix(z):
    """SplitMix64's finaliser: a bijection of 64 bits in which every input bit stirs every output bit."""
    z = (z ^ (z >> _U30)) * _U_MIX_1
    z = (z ^ (z >> _U27)) * _U_MIX_2
    return z ^ (z >> _U31)


@njit(nogil=True)
def _chain(key, value):
    """Fold one more coordinate into a key."""
    return _mix((key ^ np.uint64(value)) + _U_GOLDEN)


@njit(nogil=True)
def _uniform(key, slot):
    """U[0, 1) with 53 bits, at a slot of the key."""
    return np.float64(_mix(key + np.uint64(slot + 1) * _U_GOLDEN) >> _U11) * (1.0 / 9007199254740992.0)


@njit(nogil=True)
def _between(key, slot, low, high):
    """U[low, high)."""
    return low + (high - low) * _uniform(key, slot)


@njit(nogil=True)
def _draw_box(key, law, height, width, row):
    """RandomResizedCrop's law: ten tries at an area and aspect, then the nearest central crop."""
    for attempt in range(_TRIES):
        slot = 4 * attempt
        area = height * width * _between(key, slot, law.scale_low, law.scale_high)
        aspect = math.exp(_between(key, slot + 1, law.log_ratio_low, law.log_ratio_high))
        w = np.floor(math.sqrt(area * aspect) + 0.5)
        h = np.floor(math.sqrt(area / aspect) + 0.5)
        if 0 < w <= width and 0 < h <= height:
            row.height, row.width = h, w
            row.top = np.floor(_uniform(key, slot + 2) * (height - h + 1))
            row.left = np.floor(_uniform(key, slot + 3) * (width - w + 1))
            return
    low, high = math.exp(law.log_ratio_low), math.exp(law.log_ratio_high)
    w, h = np.float64(width), np.float64(height)
    if w / h < low:
        h = np.floor(w / low + 0.5)
    elif w / h > high:
        w = np.floor(h * high + 0.5)
    row.height, row.width = h, w
    row.top = np.floor((height - h) / 2)
    row.left = np.floor((width - w) / 2)


@njit(nogil=True)
def _draw_order(key, order):
    """A uniform permutation of the four operations, by Fisher and Yates."""
    for k in range(4):
        order[k] = k
    for k in range(3, 0, -1):
        other = int(_uniform(key, _ORDER + k) * (k + 1))
        order[k], order[other] = order[other], order[k]


@njit(nogil=True)
def _draw_view(key, law, height, width, row):
    """Fill one row of the table."""
    _draw_box(key, law, height, width, row)
    row.flip = _uniform(key, _FLIP) < law.flip
    row.gray = _uniform(key, _GRAY) < law.gray
    row.solarize = _uniform(key, _SOLARIZE) < law.solarize
    row.brightness, row.contrast, row.saturation, row.hue = 1.0, 1.0, 1.0, 0.0
    if _uniform(key, _JITTER) < law.jitter:
        row.brightness = _between(key, _FACTOR, max(0.0, 1 - law.brightness), 1 + law.brightness)
        row.contrast = _between(key, _FACTOR + 1, max(0.0, 1 - law.contrast), 1 + law.contrast)
        row.saturation = _between(key, _FACTOR + 2, max(0.0, 1 - law.saturation), 1 + law.saturation)
        row.hue = _between(key, _FACTOR + 3, -law.hue, law.hue)
    _draw_order(key, row.order)
    row.sigma = 0.0
    if _uniform(key, _BLUR) < law.blur:
        row.sigma = _between(key, _SIGMA, law.sigma_low, law.sigma_high)


@njit(nogil=True, cache=True)
def fill(laws, seed, epoch, index, heights, widths, rows):
    """Draw every view of every image into ``rows`` (B, V): the compiled body of :func:`table`."""
    start = _chain(_chain(np.uint64(0), seed), epoch)
    for b in range(len(index)):
        image = _chain(start, index[b])
        for v in range(len(laws)):
            _draw_view(_chain(image, v), laws[v], heights[b], widths[b], rows[b, v])


def encode(views: Sequence[View]) -> NDArray[np.void]:
    """The distributions of each view as one ``LAW`` record: (V,)."""
    laws = np.zeros(len(views), LAW)
    for law, view in zip(laws, views, strict=True):
        jitter = view.jitter or Jitter(p=0.0)
        blur = view.blur or Blur(p=0.0)
        solarize = view.solarize or Solarize(p=0.0)
        law["scale_low"], law["scale_high"] = view.scale
        law["log_ratio_low"], law["log_ratio_high"] = np.log(view.ratio)
        law["flip"], law["gray"], law["solarize"] = view.flip, view.gray, solarize.p
        law["jitter"], law["hue"] = jitter.p, jitter.hue
        law["brightness"], law["contrast"] = jitter.brightness, jitter.contrast
        law["saturation"] = jitter.saturation
        law["blur"], (law["sigma_low"], law["sigma_high"]) = blur.p, blur.sigma
    return laws


def table(
    views: Sequence[View], seed: int, epoch: int, index: ArrayLike, heights: ArrayLike, widths: ArrayLike
) -> NDArray[np.void]:
    """Draw what will happen to each view of each image.

    ``index`` (B,) are positions in the training set; ``heights`` and ``widths`` are the images' sizes,
    (B,) or one number for all. Returns a structured array (B, V) of dtype :data:`DRAW`.
    """
    index = np.ascontiguousarray(index, np.int64)
    heights = np.ascontiguousarray(np.broadcast_to(heights, index.shape), np.int64)
    widths = np.ascontiguousarray(np.broadcast_to(widths, index.shape), np.int64)
    laws = encode(flat(views))
    rows = np.empty((len(index), len(laws)), DRAW)
    fill(laws, _signed(seed & _MASK), epoch, index, heights, widths, rows)
    return rows


def integers(seed: int | Tensor, step: int | Tensor, index: Tensor, count: int, high: int) -> Tensor:
    """Stateless uniform integers in [0, high), on ``index``'s device: (B,) -> (B, count).

    Row b is a pure function of (seed, step, index[b]), so every rank draws the same row for an image.
    The remainder of 63 bits favours no value by more than high / 2^63. ``seed`` and ``step`` may be int64
    tensors () on that device: the same row, and the host does not wait to read them.
    """
    rows = index.new_zeros((), dtype=torch.int64)
    for value in (seed, step, index.long()):  # the chain of `key`
        rows = _mix_tensor((rows ^ (value if isinstance(value, Tensor) else _signed(value & _MASK))) + _signed(_GOLDEN))
    columns = torch.arange(1, count + 1, device=index.device) * _signed(_GOLDEN)  # (count,)
    return (_mix_tensor(rows[:, None] + columns) & ((1 << 63) - 1)) % high  # (B, count)


def permutation(seed: int, step: int, n: int) -> Tensor:
    """A stateless uniform permutation of range(n), the same on every rank: (n,) int64 on the CPU."""
    generator = torch.Generator().manual_seed(_signed(key(seed, step)))
    return torch.randperm(n, generator=generator)


def key(*coordinates: int) -> int:
    """One 64-bit hash of some integers: the chain of the compiled draws, in Python."""
    state = 0
    for value in coordinates:
        z = ((state ^ (value & _MASK)) + _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
        state = z ^ (z >> 31)
    return state


def _signed(value: int) -> int:
    """The int64 with the bits of this uint64: torch multiplies and adds it modulo 2^64 all the same."""
    return value - (1 << 64) if value >> 63 else value


def _mix_tensor(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors, whose right shift must first be made logical."""
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)
