"""CPC: Representation Learning with Contrastive Predictive Coding (van den Oord et al. 2018, arXiv 1807.03748), and
v2: Data-Efficient Image Recognition with Contrastive Predictive Coding (Henaff et al. 2020, arXiv 1905.09272).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslzoo.blocks import MLP, Encoder
from sslzoo.blocks.context import Context
from sslzoo.blocks.crops import the_only_one
from sslzoo.blocks.patches import DRAWS, distorted
from sslzoo.errors import UserError
from sslzoo.losses import patch_info_nce
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim
from sslzoo.views.draw import integers


class CPC(Method):
    """From the patches seen so far, row by row, predict the features of patches further down.

    ``L = -sum_k log exp(s W_k c_rj . t_r+k,j) / sum_t exp(s W_k c_rj . t)`` (v1, eq. 4): c_rj summarises rows up to r,
    W_k predicts k rows ahead, t runs over all patches of a group of images; the mean over places and images.

    Args:
        encoder: f, a PatchEncoder, or any with its ``patches`` and ``encode``.
        optim: the recipe's optimizer.
        dim: width of predictions and targets.
        offsets: the k. Rows that overlap the one predicted from give the answer away: begin where overlap ends.
        directions: 1, downwards, or 4, each with its own context and W; the loss is their mean.
        hidden, blocks: of the context network.
        scale: s.
        group: images whose patches are told apart, 16 as on the papers' devices. Groups follow one another in the
            batch, so the loss is the same on any number of ranks.
        crop, drop, flip, jitter: how patches are distorted one by one; see ``distorted``.

    Raises:
        UserError: if the encoder has no patches, the offsets do not fit their grid, or the batch not the groups.
    """

    compares_views = False

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        dim: int = 64,
        offsets: Sequence[int] = (2, 3, 4, 5),
        directions: int = 1,
        hidden: int = 256,
        blocks: int = 5,
        scale: float = 0.1,
        group: int = 16,
        crop: int = 0,
        drop: float = 0.0,
        flip: bool = False,
        jitter: float = 0.0,
    ):
        super().__init__(encoder, optim)
        if getattr(encoder, "patches", None) is None:
            raise UserError("CPC predicts patches of an image: set encoder._target_=sslzoo.blocks.PatchEncoder")
        if directions not in (1, 4) or not offsets or min(offsets) < 1:
            raise UserError(f"method.directions={directions} must be 1 or 4, method.offsets={list(offsets)} 1 or more")
        self.projector = MLP(encoder.dim, dim)
        self.contexts = nn.ModuleList(Context(encoder.dim, hidden, blocks) for _ in range(directions))
        self.predictors = nn.ModuleList(
            nn.ModuleList(MLP(encoder.dim, dim) for _ in offsets) for _ in range(directions)
        )  # W_k
        self.offsets, self.scale, self.group = tuple(offsets), scale, group
        self.crop, self.drop, self.flip, self.jitter = crop, drop, flip, jitter
        self.candidates = 0  # targets that a prediction chooses from; the first batch tells

    def loss(self, batch: Batch) -> Tensor:
        x = the_only_one(batch.views, "CPC")
        patches = self.encoder.patches(x)  # (B, G, G, 3, P, P)
        self.check(len(x))  # a device's share of the batch
        self.check_grid(patches)
        drawn = integers(self.seed, self.step, batch.index, patches[0, :, :, 0, 0, 0].numel() * DRAWS, 2**32)
        z = self.encoder.encode(distorted(patches, drawn, self.crop, self.drop, self.flip, self.jitter))  # (B, G, G, D)
        t = self.projector(z)  # (B, G, G, d)
        turns = enumerate(zip(self.contexts, self.predictors, strict=True))
        losses = [self.downwards(z.rot90(k, (1, 2)), t.rot90(k, (1, 2)), *nets) for k, nets in turns]
        return torch.stack(losses).mean()

    def downwards(self, z: Tensor, t: Tensor, context: nn.Module, predictors: nn.ModuleList) -> Tensor:
        """Predict targets ``t`` (B, G, G, d) from the features ``z`` (B, G, G, D) of rows above."""
        c = context(z)  # (B, G, G, D)
        pairs = zip(self.offsets, predictors, strict=True)
        return sum(patch_info_nce(predict(c[:, :-k]), t, k, self.scale, self.group) for k, predict in pairs)

    def check(self, batch_size: int) -> None:
        """Refuse a batch that does not split into groups."""
        if batch_size % self.group:
            raise UserError(
                f"method.group={self.group} does not divide a batch of {batch_size};"
                " change method.group or data.batch_size"
            )

    def check_views(self, views: list[Tensor]) -> None:
        """Refuse images that do not give a grid of patches, and offsets beyond it."""
        self.check_grid(self.encoder.patches(the_only_one(views, "CPC")))

    def check_grid(self, patches: Tensor) -> None:
        """Refuse offsets beyond the grid of ``patches`` (B, G, G, 3, P, P)."""
        rows, columns = patches.shape[1:3]
        if max(self.offsets) >= min(rows, columns):
            raise UserError(
                f"method.offsets={list(self.offsets)} reach beyond a grid of {rows} x {columns} patches;"
                f" the largest is {min(rows, columns) - 1}"
            )
        self.candidates = self.group * rows * columns

    def loss_at_chance(self) -> float | None:
        """All patches of a group alike: their logarithm for each offset; None before the first batch."""
        return len(self.offsets) * math.log(self.candidates) if self.candidates else None
