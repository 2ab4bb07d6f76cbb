"""What a recipe says about its views: plain frozen data, checked when it is written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sslzoo.errors import UserError

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Jitter:
    """Random brightness, contrast, saturation and hue, in random order: torchvision's ``ColorJitter``.

    A strength ``b`` draws its factor from U[max(0, 1 - b), 1 + b], ``hue`` its shift from U[-hue, hue]
    in turns of the colour wheel. ``p`` is the probability that the four are applied at all.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 0.8

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            strength = getattr(self, name)
            _check(strength >= 0, f"jitter.{name}", strength, "give a strength of 0 or more")
        _check(0 <= self.hue <= 0.5, "jitter.hue", self.hue, "give a shift between 0 and 0.5 turns")
        _check_probability("jitter.p", self.p)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur with probability ``p`` and a width drawn from U[sigma], in pixels of the view.

    ``kernel`` is an odd number of taps; ``None`` reaches 3 sigma to each side, whatever sigma was drawn.
    Borders reflect, as in torchvision's ``gaussian_blur``.
    """

    p: float
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: int | None = None

    def __post_init__(self) -> None:
        _check_probability("blur.p", self.p)
        _check_range("blur.sigma", self.sigma)
        odd = self.kernel is None or (self.kernel > 0 and self.kernel % 2 == 1)
        _check(odd, "blur.kernel", self.kernel, "give an odd number of taps, or null for 3 sigma")


@dataclass(frozen=True)
class Solarize:
    """With probability ``p``, invert every channel value of at least ``threshold`` (values in 0..1)."""

    p: float
    threshold: float = 0.5

    def __post_init__(self) -> None:
        _check_probability("solarize.p", self.p)
        _check(0 <= self.threshold <= 1, "solarize.threshold", self.threshold, "give a value between 0 and 1")


@dataclass(frozen=True)
class View:
    """One crop of an image and what happens to it, ``count`` times over.

    The order is fixed: RandomResizedCrop (``scale`` is the share of the area, ``ratio`` width over height,
    the resize is antialiased), horizontal flip, jitter, gray, blur, solarize, normalise. ``flip`` and
    ``gray`` are probabilities. ``gray_first`` moves gray before jitter, as InstDisc and MoCo v1 had it.
    """

    size: int
    count: int = 1
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.5
    jitter: Jitter | None = None
    gray: float = 0.0
    gray_first: bool = False
    blur: Blur | None = None
    solarize: Solarize | None = None

    def __post_init__(self) -> None:
        for name in ("size", "count"):
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= 1, name, value, "give a whole number of at least 1")
        _check_range("scale", self.scale)
        _check(self.scale[1] <= 1, "scale", self.scale, "a crop cannot exceed the image, end at 1 or below")
        _check_range("ratio", self.ratio)
        known = " or ".join(INTERPOLATIONS)
        _check(self.interpolation in INTERPOLATIONS, "interpolation", self.interpolation, f"choose {known}")
        _check_probability("flip", self.flip)
        _check_probability("gray", self.gray)
        if self.blur is not None and self.blur.kernel is not None:
            fits = self.blur.kernel // 2 < self.size
            fix = f"reflecting it needs size > kernel // 2, but size is {self.size}; set blur.kernel to null"
            _check(fits, "blur.kernel", self.blur.kernel, fix)


def parse(config: Mapping[str, Mapping[str, Any] | None]) -> list[View]:
    """Read a recipe ``{name: {size: ..., jitter: {...}, ...}, ...}`` into a flat list of views.

    Entries keep their order and are repeated ``count`` times; an entry set to ``None`` is left out.
    Raises ``UserError`` naming the entry for an unknown key or a value out of range.
    """
    views = []
    for name, entry in config.items():
        if entry is not None:
            try:
                views.append(_build(View, entry))
            except UserError as error:
                raise UserError(f"views.{name}: {error}") from None
    if not views:
        raise UserError("views is empty; name at least one crop, such as views.full.size=32")
    return flat(views)


def flat(views: Iterable[View]) -> list[View]:
    """Repeat each view ``count`` times; every view of the result stands for itself (``count`` 1)."""
    return [replace(view, count=1) for view in views for _ in range(view.count)]


PARTS = {"jitter": Jitter, "blur": Blur, "solarize": Solarize}


def _build(kind: type, entry: Mapping[str, Any]) -> Any:
    """Make a ``kind`` from a mapping, its parts from the mappings inside."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{kind.__name__.lower()} is {entry!r}; give a mapping of its keys, or null for none")
    allowed = [field.name for field in fields(kind)]
    unknown = [key for key in entry if key not in allowed]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a key of {kind.__name__}; the keys are {', '.join(allowed)}")
    values = {}
    for key, value in entry.items():
        if kind is View and key in PARTS and value is not None:
            value = _build(PARTS[key], value)
        elif key in ("scale", "ratio", "sigma"):
            value = tuple(value)
        values[key] = value
    try:
        return kind(**values)
    except TypeError as error:  # a key without a default is missing, or a value is no number
        keys = ", ".join(allowed)
        raise UserError(f"{kind.__name__} could not be read ({error}); its keys are {keys}") from None


def _check(good: bool, place: str, value: Any, fix: str) -> None:
    if not good:
        raise UserError(f"{place} is {value!r}; {fix}")


def _check_probability(place: str, p: float) -> None:
    _check(0 <= p <= 1, place, p, "give a probability between 0 and 1")


def _check_range(place: str, pair: tuple[float, float]) -> None:
    good = len(pair) == 2 and 0 < pair[0] <= pair[1]
    _check(good, place, pair, "give two positive numbers, the smaller first")
