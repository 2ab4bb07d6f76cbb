"""Features of a set under a frozen encoder, and what they look like as a whole."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslzoo.blocks import Encoder, LabEncoder, PatchEncoder
from sslzoo.data.images import ImageSet
from sslzoo.data.module import clean_batches
from sslzoo.errors import UserError
from sslzoo.views import Clean

KINDS = ("last", "last4")
PART = 2**24  # numbers of features on disk that are worked on at a time, 64 MB


def parts(n: int, dim: int) -> Iterator[slice]:
    """Slices of n rows of ``dim`` numbers, ``PART`` numbers each."""
    size = max(1, PART // dim)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def layers(encoder: Encoder, x: Tensor, kinds: Sequence[str] = ("last",)) -> dict[str, Tensor]:
    """Features of each kind, in one pass: ``(B, 3, H, W) -> {kind: (B, D_kind)}``.

    ``last`` is what ``encoder(x)`` gives. ``last4`` concatenates the last four layers: of a ViT the class tokens of
    its last four blocks, normalised as its last one is (DINO, sec. 3.2 and its code), of other networks the averages
    of their stage maps.
    """
    if tuple(kinds) == ("last",):
        return {"last": encoder(x)}
    if isinstance(encoder, PatchEncoder):
        last, four = encoder(x), [each.mean((2, 3)) for each in encoder.maps(x)]
    elif isinstance(encoder, LabEncoder):
        views = [_last_and_four(net, view) for net, view in zip(encoder.net, encoder.views(x), strict=True)]
        last = torch.cat([last for last, _ in views], 1)
        four = [torch.cat(of_stage, 1) for of_stage in zip(*(four for _, four in views), strict=True)]
    else:
        last, four = _last_and_four(encoder.net, x)
    found = {"last": last, "last4": torch.cat(four, 1)}
    return {kind: found[kind] for kind in kinds}


def _last_and_four(net: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The feature ``(B, D)`` of one timm model, and those of its last four layers."""
    if isinstance(net, VisionTransformer) and net.cls_token is not None:
        final, blocks = net.forward_intermediates(x, indices=4, return_prefix_tokens=True, norm=True)
        return net.forward_head(final), [prefix[:, 0] for _, prefix in blocks]
    final, maps = net.forward_intermediates(x, indices=4)
    return net.forward_head(final), [each.mean((2, 3)) for each in maps]


def feature_batches(
    encoder: Encoder,
    images: ImageSet,
    clean: Clean,
    kinds: Sequence[str] = ("last",),
    rows: Sequence[int] | None = None,
    batch_size: int = 512,
    on_error: str = "raise",
    half: bool = False,
) -> Iterator[tuple[dict[str, Tensor], np.ndarray]]:
    """Features of ``rows`` (default: all) in eval mode, without augmentation, a batch at a time.

    Args:
        half: compute in bfloat16; for curves, not for published numbers.

    Yields:
        ``{kind: (b, D_kind)}`` float32 on the encoder's device, and the rows they belong to ``(b,)``.

    Raises:
        UserError: if features are not finite.
    """
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    try:
        for x, part in clean_batches(images, clean, batch_size, rows, on_error):
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                found = layers(encoder, x.to(device, non_blocking=True), kinds)
            found = {kind: h.float() for kind, h in found.items()}
            if not all(h.isfinite().all() for h in found.values()):
                raise UserError("the backbone gives features that are not finite (NaN or inf); it was not trained well")
            yield found, part
    finally:
        encoder.train(training)


def features(
    encoder: Encoder,
    images: ImageSet,
    clean: Clean,
    rows: Sequence[int] | None = None,
    batch_size: int = 512,
    on_error: str = "raise",
    half: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit features of ``rows``, ``(n, D)`` float32, and the rows they belong to ``(n,)``; see ``feature_batches``."""
    rows = np.arange(len(images)) if rows is None else rows
    found, kept = None, []
    for h, part in feature_batches(encoder, images, clean, ("last",), rows, batch_size, on_error, half):
        z = normalize(h["last"], dim=1).cpu().numpy()
        found = np.empty((len(rows), z.shape[1]), np.float32) if found is None else found  # once: it may be large
        done = sum(map(len, kept))
        found[done : done + len(part)] = z
        kept.append(part)
    return found[: sum(map(len, kept))], np.concatenate(kept)


def unit(z: np.ndarray) -> np.ndarray:
    """Rows of length one, ``(n, D)``, a copy."""
    return normalize(torch.from_numpy(np.array(z)), dim=1).numpy()


def unit_parts(z: np.ndarray) -> Iterator[np.ndarray]:
    """The same a part at a time, so that features which lie on disk stay there."""
    for part in parts(*z.shape):
        yield unit(z[part])


def check_size(
    encoder: Encoder, size: int, kinds: Sequence[str] = ("last",), setting: str = "image_size"
) -> dict[str, int]:
    """Try the encoder, in eval mode from here on, on one empty image; returns the width of each kind of feature.

    Args:
        size: side of the image in pixels, which ``setting`` says.

    Raises:
        UserError: if the encoder cannot take images of this size.
    """
    device = next(encoder.parameters()).device
    try:
        with torch.no_grad():
            found = layers(encoder.eval(), torch.zeros(1, 3, size, size, device=device), kinds)
    except (AssertionError, RuntimeError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the backbone takes no images of {setting}={size} pixels ({said}); set {setting} to its own"
        ) from error
    return {kind: h.shape[1] for kind, h in found.items()}


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
