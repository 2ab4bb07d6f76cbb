"""Keypoints of one object: a network on the backbone tells where each of them is in the object's image.

Either coordinates are regressed from the pooled feature, or heat maps are drawn from the last map by transposed
convolutions (Xiao et al. 2018, Simple Baselines, arXiv 1804.06208) and their highest places are taken.

Points are ``(B, K, 3)``: x and y in pixels from the middle of the image's first pixel, and 0 where a point is missing.
Missing points add nothing to a loss, nor to its mean: that is over the labelled points of all ranks.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from sslzoo.blocks import Encoder
from sslzoo.data.box_module import BoxBatch
from sslzoo.data.module import default_workers
from sslzoo.data.points import PointSet, clean_view, in_picture
from sslzoo.dist import all_sum, rank, world
from sslzoo.errors import UserError
from sslzoo.losses import full
from sslzoo.method import Method
from sslzoo.optim import Optim

MODELS = ("regression", "heatmap")


class Normalise(nn.Module):
    """Pixels of 0..255 as the encoder knows them: ``(B, 3, H, W) -> (B, 3, H, W)``.

    Args:
        mean, std: of R, G and B in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.mean) - self.mean) / self.std


class Regression(nn.Module):
    """Coordinates by one linear layer: square images ``(B, 3, S, S)`` of 0..255 ``-> (B, K, 2)`` in -1..1.

    Args:
        encoder: any.
        points: K.
        mean, std: see ``Normalise``.
    """

    def __init__(self, encoder: Encoder, points: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.encoder, self.points = encoder, points
        self.normalise = Normalise(mean, std)
        self.linear = nn.Linear(encoder.dim, 2 * points)

    def forward(self, x: Tensor) -> Tensor:
        return full(self.linear(self.encoder(self.normalise(x)))).unflatten(1, (self.points, 2))

    def loss(self, found: Tensor, points: Tensor, size: int) -> Tensor:
        """L2: the mean of squared errors in -1..1 over x and y of the labelled points of all ranks.

        Args:
            found: what ``forward`` gave.
            points: ``(B, K, 3)``.
            size: S.
        """
        wanted = (2 * points[..., :2] + 1) / size - 1  # as (x - 48) / 48 in 96 pixels, x from the corner
        return labelled_mean((found - wanted).square().mean(-1), points[..., 2] > 0)

    def places(self, found: Tensor, size: int) -> Tensor:
        """Where the points are, ``(B, K, 2)`` in pixels of the image."""
        return ((found + 1) * size - 1) / 2


class HeatMaps(nn.Module):
    """One map a point: square images ``(B, 3, S, S)`` of 0..255 ``-> (B, K, h, h)``.

    The last map goes through transposed convolutions of stride 2, each with BatchNorm and ReLU, and a 1 x 1
    convolution (Simple Baselines, sec. 2).

    Args:
        encoder: any with maps.
        points: K.
        mean, std: see ``Normalise``.
        deconvs: transposed convolutions; 3 in the paper.
        channels: of each; 256 in the paper.
        sigma: of the Gaussian that is drawn around a point, in pixels of the map; 2 in the paper's code, for 64 pixels.
    """

    def __init__(
        self,
        encoder: Encoder,
        points: int,
        mean: Sequence[float],
        std: Sequence[float],
        deconvs: int = 3,
        channels: int = 256,
        sigma: float = 2.0,
    ):
        super().__init__()
        for name, value in (("deconvs", deconvs), ("channels", channels)):
            if value < 1:
                raise UserError(f"task.{name}={value} is none; set it to 1 or more")
        if not sigma > 0:
            raise UserError(f"task.sigma={sigma} draws no Gaussian; set it to more than 0")
        self.encoder, self.sigma = encoder, sigma
        self.normalise = Normalise(mean, std)
        layers, width = [], encoder.widths[-1]
        for _ in range(deconvs):
            layers += [
                nn.ConvTranspose2d(width, channels, kernel_size=4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            nn.init.normal_(layers[-3].weight, std=0.001)
            width = channels
        self.deconvs = nn.Sequential(*layers)
        self.maps = nn.Conv2d(channels, points, kernel_size=1)
        nn.init.normal_(self.maps.weight, std=0.001)
        nn.init.zeros_(self.maps.bias)

    def forward(self, x: Tensor) -> Tensor:
        return full(self.maps(self.deconvs(self.encoder.maps(self.normalise(x))[-1])))

    def loss(self, found: Tensor, points: Tensor, size: int) -> Tensor:
        """The mean of squared errors over the pixels of the maps, and over the labelled points of all ranks.

        The official code divides by all points, labelled or not, and by 2.

        Args:
            found: what ``forward`` gave.
            points: ``(B, K, 3)``.
            size: S.
        """
        wanted = gaussians(points, size, found.shape[-1], self.sigma)
        return labelled_mean((found - wanted).square().mean((2, 3)), points[..., 2] > 0)

    def places(self, found: Tensor, size: int) -> Tensor:
        """Where the points are, ``(B, K, 2)`` in pixels of the image."""
        return (highest(found) + 0.5) * (size / found.shape[-1]) - 0.5


def labelled_mean(values: Tensor, labelled: Tensor) -> Tensor:
    """The mean of ``values`` ``(B, K)`` where they are ``labelled`` ``(B, K)``, over all ranks; zero where none is.

    Returns:
        A scalar whose mean over ranks is that mean; they may have unlike numbers of labelled points.
    """
    total = torch.where(labelled, values, torch.zeros_like(values)).sum()
    return world() * total / all_sum(labelled.sum()).clamp(min=1)


def gaussians(points: Tensor, size: int, side: int, sigma: float) -> Tensor:
    """Maps of height 1 at each point: ``(B, K, 3) -> (B, K, side, side)``, zero where it is missing.

    They are centred where the point is, not on the nearest pixel of the map as in the official code (Zhang et al. 2020,
    DARK, arXiv 1910.06278, sec. 3.2): so the second highest pixel tells on which side of the highest it lies.

    Args:
        points: in pixels of an image of ``size`` pixels.
        side: of the maps.
        sigma: in pixels of the maps.
    """
    middle = (points[..., :2] + 0.5) * (side / size) - 0.5  # (B, K, 2)
    grid = torch.arange(side, device=points.device, dtype=points.dtype)
    x, y = torch.exp(-(grid - middle[..., None]).square() / (2 * sigma**2)).unbind(-2)  # (B, K, side) each
    return torch.where((points[..., 2] > 0)[..., None, None], y[..., :, None] * x[..., None, :], 0)


def highest(maps: Tensor) -> Tensor:
    """The highest pixel, moved by a quarter towards the higher neighbour: ``(B, K, h, w) -> (B, K, 2)``, x and y."""
    height, width = maps.shape[-2:]
    at = maps.flatten(2).argmax(-1)
    y, x = at // width, at % width

    def slope(dy: int, dx: int) -> Tensor:
        """The neighbour after less the one before; zero at the border."""
        flat = maps.flatten(2)
        inside = (y >= dy) & (y < height - dy) & (x >= dx) & (x < width - dx)
        step = dy * width + dx
        after, before = ((at + sign * step).clamp(0, flat.shape[-1] - 1)[..., None] for sign in (1, -1))
        return torch.where(inside, (flat.gather(-1, after) - flat.gather(-1, before))[..., 0], 0)

    return torch.stack([x + slope(0, 1).sign() / 4, y + slope(1, 0).sign() / 4], dim=-1)


class Keypoints(Method):
    """The loss of a network that places points.

    Args:
        net: ``Regression`` or ``HeatMaps``.
        optim: the optimizer's recipe.
        clip: largest norm of the gradients; None leaves them.
    """

    sync_batchnorm = True
    settings = "task.optim"

    def __init__(self, net: Regression | HeatMaps, optim: Optim | None = None, clip: float | None = None):
        super().__init__(net.encoder, optim)
        self.net, self.clip = net, clip
        self.train()

    def loss(self, batch: BoxBatch) -> Tensor:
        x = torch.stack(batch.images)  # (B, 3, S, S)
        points = torch.stack([target["points"] for target in batch.targets])  # (B, K, 3)
        return self.net.loss(self.net(x), points, x.shape[-1])

    def before_step(self) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)


def build(
    model: str,
    encoder: Encoder,
    points: int,
    mean: Sequence[float],
    std: Sequence[float],
    deconvs: int = 3,
    channels: int = 256,
    sigma: float = 2.0,
) -> Regression | HeatMaps:
    """A network that places ``points`` points, on ``encoder``; see ``Regression`` and ``HeatMaps``.

    Raises:
        UserError: on an unknown ``model``, or numbers that mean nothing.
    """
    if model not in MODELS:
        raise UserError(f"task.model={model} is none of {', '.join(MODELS)}")
    if model == "regression":
        return Regression(encoder, points, mean, std)
    return HeatMaps(encoder, points, mean, std, deconvs, channels, sigma)


@torch.no_grad()
def predict(module: Keypoints, examples: PointSet, size: int, batch_size: int = 64) -> Tensor:
    """Where the points of every example are, in eval mode; ranks share the work, and each gets all of it.

    Args:
        module: trained.
        examples: the set.
        size: side of the views in pixels.
        batch_size: views at once.

    Returns:
        ``(N, K, 2)`` float32, x and y in pixels of the example's picture.
    """
    device, training = next(module.parameters()).device, module.training
    mine = np.arange(len(examples))[rank() :: world()]
    found = torch.zeros(len(examples), len(examples.names), 2, device=device)
    module.eval()
    try:
        views = _clean_views(examples, mine, size)
        for start in range(0, len(mine), batch_size):
            x = torch.stack(list(islice(views, batch_size))).to(device)
            rows = mine[start : start + batch_size]
            found[rows] = in_picture(examples, rows, module.net.places(module.net(x), size), size).float()
    finally:
        module.train(training)
    return all_sum(found).cpu()


def _clean_views(examples: PointSet, rows: np.ndarray, size: int) -> Iterator[Tensor]:
    """Views of ``rows`` in their order, a few of them made ahead."""
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(default_workers()) as pool:
        for row in rows.tolist():
            ahead.append(pool.submit(clean_view, examples, row, size))
            if len(ahead) > 64:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
