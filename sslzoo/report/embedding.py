"""What a backbone makes of held-out images: a map of them in the plane, and the spectrum of their features."""

import io
from dataclasses import dataclass

import numpy as np
from sklearn.manifold import TSNE

from sslzoo.blocks.encoder import Encoder
from sslzoo.data.images import ImageSet
from sslzoo.data.module import Images, clean_batches
from sslzoo.downstream.features import features
from sslzoo.report.attention import class_attention, has_class_token, strips
from sslzoo.views import Clean


@dataclass(frozen=True)
class Map:
    """What is shown of one backbone.

    Attributes:
        name: of its row in the table, or ``random init``.
        points: its images in the plane, ``(n, 2)``; none where it was not mapped.
        labels: ``(n,)``, -1 where unknown.
        classes: label -> name, of the labels that occur.
        spectrum: see ``spectrum``.
        attention: a PNG of where a ViT looks, or None.
    """

    name: str
    points: np.ndarray
    labels: np.ndarray
    classes: dict[int, str]
    spectrum: np.ndarray
    attention: bytes | None = None


def look(name: str, encoder: Encoder, data: Images, count: int, mapped: bool = True) -> Map:
    """What a backbone makes of at most ``count`` held-out images (training images where none are held out).

    Args:
        mapped: whether to make the map and the picture of attention, beside the spectrum.

    Raises:
        UserError: if features are not finite.
    """
    images = data.train if data.val is None else data.val
    z, rows = features(encoder, images, data.clean, rows_to_map(images, count), on_error=data.on_error)
    if not mapped:
        return Map(name, np.zeros((0, 2)), np.zeros(0, int), {}, spectrum(z))
    labels = images.labels[rows]
    classes = {int(label): images.classes[label] for label in np.unique(labels) if 0 <= label < len(images.classes)}
    attention = attention_png(encoder, data, images, rows) if has_class_token(encoder) else None
    return Map(name, plane(z), labels, classes, spectrum(z), attention)


def rows_to_map(images: ImageSet, count: int, classes: int = 10) -> np.ndarray:
    """At most ``count`` rows, of at most ``classes`` classes spread over all; the same at every call, ``(n,)``."""
    labels = images.labels
    known = np.unique(labels[labels >= 0])
    rows = np.arange(len(images))
    if len(known):
        kept = known[np.linspace(0, len(known) - 1, min(classes, len(known))).astype(int)]
        rows = np.flatnonzero(np.isin(labels, kept))
    return rows if len(rows) <= count else np.sort(np.random.default_rng(0).choice(rows, count, replace=False))


def plane(z: np.ndarray) -> np.ndarray:
    """t-SNE of unit features (van der Maaten and Hinton 2008), begun at principal axes: ``(n, D) -> (n, 2)``."""
    if len(z) < 5:
        return np.pad(z, ((0, 0), (0, 2)))[:, :2]
    perplexity = min(30.0, (len(z) - 1) / 3)
    sne = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0)
    return sne.fit_transform(z)


def spectrum(z: np.ndarray) -> np.ndarray:
    """Singular values of the centred features, as shares of the largest, ``(n, D) -> (min(n, D),)``.

    Those of collapsed features drop to nothing at once (Jing et al. 2022, sec. 3).
    """
    sigma = np.linalg.svd(z - z.mean(0), compute_uv=False)
    return sigma / max(float(sigma[0]), 1e-12)


def attention_png(encoder: Encoder, data: Images, images: ImageSet, rows: np.ndarray, count: int = 6) -> bytes:
    """A picture of where a ViT looks in ``count`` images spread over ``rows``."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    plain = Clean(data.clean.size, mean=(0, 0, 0), std=(1, 1, 1), resize=data.clean.resize)
    x, shown = (next(clean_batches(images, view, count, chosen, data.on_error))[0] for view in (data.clean, plain))
    attention = class_attention(encoder, x.to(next(encoder.parameters()).device)).float().cpu().numpy()
    pixels = (255 * shown.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
    file = io.BytesIO()
    strips(pixels, attention).save(file, "PNG")
    return file.getvalue()
