"""InstDisc: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al. 2018,
arXiv 1805.01978).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sslzoo.blocks import MLP, Encoder
from sslzoo.blocks.crops import the_only_one
from sslzoo.errors import UserError
from sslzoo.losses import candidate_scores, first_of, nce, nce_at_chance, nce_log_z, unit
from sslzoo.memory import Bank
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim


class InstDisc(Method):
    """Every training image is a class of its own, and its class vector is the feature it had when last seen.

    ``P(i | f) = exp(v_i.f / T) / Z`` (eq. 4), v_i the bank's row of image i. The exact softmax minimises
    ``-log P`` with Z summed over the bank; NCE tells the image's own row from m random ones, with a constant Z
    (eq. 7). The proximal term ``lambda |f - v_i|^2`` (eq. 10) slows features down.

    Args:
        encoder: f.
        optim: the recipe's optimizer.
        size: N, the number of training images.
        dim: width of features.
        negatives: m, random rows per image; 0 for the exact softmax over all N.
        softmax: cross entropy over the 1 + m candidates instead of NCE (the authors' later release).
        temperature: T.
        momentum: of the bank.
        proximal: lambda. 0 as in the authors' code, where the bank's momentum plays its role.

    Raises:
        UserError: if ``size`` is missing or there are more negatives than images.
    """

    compares_views = False

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        size: int | None = None,
        dim: int = 128,
        negatives: int = 4096,
        softmax: bool = False,
        temperature: float = 0.07,
        momentum: float = 0.5,
        proximal: float = 0.0,
    ):
        super().__init__(encoder, optim)
        if size is None or not 0 <= negatives <= size:
            raise UserError(
                f"method.negatives={negatives} of method.size={size} images does not work: size is the number of"
                " training images, negatives at most as many, or 0 for the exact softmax"
            )
        self.projector = MLP(encoder.dim, dim)
        self.bank = Bank(size, dim, momentum)
        self.size, self.negatives, self.softmax = size, negatives, softmax
        self.temperature, self.proximal = temperature, proximal
        self.register_buffer("log_z", torch.zeros(()))  # 0: not yet estimated
        self.fresh: list[tuple[Tensor, Tensor]] = []  # index and feature of this optimizer step's images

    def loss(self, batch: Batch) -> Tensor:
        x = the_only_one(batch.views, "InstDisc")
        return self.contrast(unit(self.projector(self.encoder(x))), batch.index)

    def contrast(self, f: Tensor, index: Tensor) -> Tensor:
        """Unit features ``f`` (B, d) of the images ``index`` (B,) against the bank."""
        self.fresh.append((index, f.detach()))
        loss = self.all_of_bank(f, index) if self.negatives == 0 else self.some_of_bank(f, index)
        if self.proximal:
            loss = loss + self.proximal * (f - self.bank.slots[index]).square().sum(1).mean()
        return loss

    def all_of_bank(self, f: Tensor, index: Tensor) -> Tensor:
        """The exact softmax."""
        scores = candidate_scores(f, self.bank.slots, self.temperature)  # (B, N)
        return F.cross_entropy(scores, index)

    def some_of_bank(self, f: Tensor, index: Tensor) -> Tensor:
        """NCE, or softmax over its candidates."""
        scores = candidate_scores(f, self.bank.draw(index, self.negatives), self.temperature)  # (B, 1 + m)
        if self.softmax:
            return first_of(scores)
        self.log_z.copy_(nce_log_z(scores, self.log_z, self.size))
        return nce(scores, self.log_z, self.size)

    def after_step(self) -> None:
        # The loss sees the rows of the last visit: they move only now.
        index, f = (torch.cat(part) for part in zip(*self.fresh, strict=True))
        self.bank.update(index, f)
        self.fresh.clear()

    def loss_at_chance(self) -> float:
        """Of equal scores: ``ln N`` or ``ln(1 + m)`` for softmax."""
        if self.negatives and not self.softmax:
            return nce_at_chance(self.negatives)
        return math.log(1 + self.negatives if self.negatives else self.size)
