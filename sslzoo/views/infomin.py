"""InfoMin Aug: What Makes for Good Views for Contrastive Learning? (Tian et al. 2020, arXiv 2005.10243)."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from sslzoo.errors import UserError
from sslzoo.views import draw
from sslzoo.views.executor import IMAGENET_MEAN, IMAGENET_STD, Images, Views
from sslzoo.views.spec import Blur, Jitter, View


class InfoMin:
    """MoCo v2's views in stronger colours, with RandAugment before gray; called like :class:`Views`, and slow.

    Crop, flip, jitter and blur are the fused pass; RandAugment is timm's, as in the authors' code, one PIL image at a
    time. It shifts by up to 0.45 of the side, and what it uncovers takes the mean colour. A pure function of (seed,
    epoch, index, view): the generators of ``random`` and NumPy that timm draws from are seeded for each view of each
    image under a lock, and put back; torch's, which the training step uses beside it, is left alone.

    Args:
        size: of the views in pixels.
        mean, std, seed: as for Views.
        count: how many views.
        scale: of the crop, as a share of the area.
        strength: of the jitter in brightness, contrast and saturation; a quarter of it in hue.
        jitter, blur, gray: probabilities.
        operations, magnitude: of RandAugment, the second in 0..10.

    Raises:
        UserError: on a value out of range.
    """

    _lock = threading.Lock()

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
        count: int = 2,
        scale: Sequence[float] = (0.2, 1.0),
        strength: float = 0.8,
        jitter: float = 0.8,
        blur: float = 0.5,
        gray: float = 0.2,
        operations: int = 2,
        magnitude: int = 10,
    ):
        if operations < 0 or not 0 <= magnitude <= 10 or not 0 <= gray <= 1:
            raise UserError(
                f"views.operations={operations}, views.magnitude={magnitude} and views.gray={gray} must be at least 0,"
                " between 0 and 10, and between 0 and 1"
            )
        colours = Jitter(strength, strength, strength, strength / 4, jitter)
        first = View(size, count, tuple(scale), jitter=colours, blur=Blur(blur))  # type: ignore[arg-type]
        self.first = Views([first], mean=(0, 0, 0), std=(1, 1, 1), seed=seed)
        fill = tuple(round(255 * value) for value in mean)
        self.augment = rand_augment_transform(f"rand-m{magnitude}-n{operations}-mstd0.5", {"img_mean": fill})
        self.mean, self.std = (torch.tensor(list(x)).view(-1, 1, 1) for x in (mean, std))
        self.seed, self.count, self.gray = seed, count, gray

    def buffers(self, batch: int, pin: bool = False) -> None:
        """Nothing to reuse: every batch is made anew."""

    def __call__(
        self, images: Images, index: ArrayLike, epoch: int, out: None = None, pool: Executor | None = None
    ) -> list[Tensor]:
        """Make the views of a batch: V x (B, 3, S, S), float32, channels last. ``out`` changes nothing."""
        views = self.first(images, index, epoch, pool=pool)
        rows = np.asarray(index, np.int64).tolist()
        with self._lock:
            state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
            try:
                return [self._finish(x, [draw.key(self.seed, epoch, i, v) for i in rows]) for v, x in enumerate(views)]
            finally:
                random.setstate(state)
                np.random.set_state(numpy_state)  # noqa: NPY002

    def _finish(self, x: Tensor, keys: list[int]) -> Tensor:
        """RandAugment, gray, normalise: ``(B, 3, S, S)`` in 0..1, with a key for each row."""
        pixels = x.permute(0, 2, 3, 1).mul(255).round().byte().numpy()  # (B, S, S, 3)
        x = torch.from_numpy(np.stack([self._augmented(row, key) for row, key in zip(pixels, keys, strict=True)]))
        return (x.permute(0, 3, 1, 2).div(255) - self.mean) / self.std

    def _augmented(self, pixels: np.ndarray, key: int) -> np.ndarray:
        """RandAugment and gray of one image, ``(S, S, 3)`` uint8."""
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002
        image = self.augment(Image.fromarray(pixels))
        if random.random() < self.gray:
            image = image.convert("L").convert("RGB")
        return np.asarray(image)
