"""Features of a set under a frozen encoder, and what they look like as a whole."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import normalize

from sslzoo.blocks.encoder import Encoder
from sslzoo.data.images import ImageSet
from sslzoo.data.module import clean_batches
from sslzoo.errors import UserError
from sslzoo.views import Clean


@torch.no_grad()
def features(
    encoder: Encoder,
    images: ImageSet,
    clean: Clean,
    rows: Sequence[int] | None = None,
    batch_size: int = 512,
    on_error: str = "raise",
    half: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit features of ``rows`` (default: all) in eval mode, without augmentation.

    Args:
        half: compute in bfloat16; for curves, not for published numbers.

    Returns:
        ``(n, D)`` float32 rows of length one, and the rows they belong to ``(n,)``.

    Raises:
        UserError: if features are not finite.
    """
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    found, kept = [], []
    try:
        for x, part in clean_batches(images, clean, batch_size, rows, on_error):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                h = encoder(x.to(device, non_blocking=True))
            found.append(normalize(h.float(), dim=1).cpu())
            kept.append(part)
    finally:
        encoder.train(training)
    z = torch.cat(found)
    if not z.isfinite().all():
        raise UserError("the backbone gives features that are not finite (NaN or inf); it was not trained well")
    return z.numpy(), np.concatenate(kept)


def raw_pixels(images: ImageSet, clean: Clean, rows: Sequence[int] | None = None, on_error: str = "raise"):
    """Unit vectors of normalised pixels, the baseline that any feature has to beat; as ``features``."""
    parts = [(x.flatten(1), part) for x, part in clean_batches(images, clean, 512, rows, on_error)]
    pixels = torch.cat([x for x, _ in parts])
    return normalize(pixels, dim=1).numpy(), np.concatenate([part for _, part in parts])


def feature_std(z: np.ndarray) -> float:
    """Spread of unit features, the mean over dimensions of their standard deviation, times sqrt(D).

    1 for directions spread evenly over the sphere, 0 where all features are one point (SimSiam, sec. 4.1).
    """
    return float(z.std(axis=0).mean() * z.shape[1] ** 0.5)


def rank_me(z: np.ndarray, limit: int = 4096) -> float:
    """RankMe: the exponential of the entropy of the singular values of ``z`` (Garrido et al. 2023, eq. 1)."""
    sigma = np.linalg.svd(z[:limit], compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))
