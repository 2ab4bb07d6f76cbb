"""CMC: Contrastive Multiview Coding (Tian et al. 2020, arXiv 1906.05849)."""

import math
from itertools import permutations

import torch
from torch import Tensor, nn

from sslzoo.blocks import MLP, Encoder
from sslzoo.blocks.crops import the_only_one
from sslzoo.errors import UserError
from sslzoo.losses import candidate_scores, first_of, nce, nce_at_chance, nce_log_z, unit
from sslzoo.memory import Bank
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim


class CMC(Method):
    """A view of an image, say its luminance, must find the same image's other view, its colour, in memory.

    ``L = sum_{a != b} L(a, b)`` over ordered pairs of views (eq. 7, the full graph): features of view a against the
    bank of view b, own row first, then m random rows. L(a, b) is InstDisc's NCE with a Z of its own, or cross
    entropy. Two views give ``L_l + L_ab``.

    Args:
        encoder: f, one network per view: a LabEncoder, or any with its ``split``, ``dims`` and ``check``.
        optim: the recipe's optimizer.
        size: N, the number of training images.
        dim: width of each view's features.
        negatives: m, random rows per image, the same in all pairs.
        softmax: cross entropy over the candidates instead of NCE.
        temperature: T.
        momentum: of the banks.

    Raises:
        UserError: if the encoder does not split images, ``size`` is missing, or negatives do not fit it.
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
    ):
        super().__init__(encoder, optim)
        dims = getattr(encoder, "dims", None)
        if dims is None:
            raise UserError("CMC contrasts views of one image: set encoder._target_=sslzoo.blocks.LabEncoder")
        if size is None or not 0 < negatives <= size:
            raise UserError(
                f"method.negatives={negatives} of method.size={size} images does not work: size is the number of"
                " training images, negatives at least one and at most as many"
            )
        self.projectors = nn.ModuleList(MLP(width, dim) for width in dims)
        self.banks = nn.ModuleList(Bank(size, dim, momentum) for _ in dims)
        self.size, self.negatives, self.softmax, self.temperature = size, negatives, softmax, temperature
        self.register_buffer("log_z", torch.zeros(len(dims), len(dims)))  # of each pair; 0: not yet estimated
        self.fresh: list[tuple[Tensor, list[Tensor]]] = []  # indices, and each view's features, of this step
        self.checked = False

    def loss(self, batch: Batch) -> Tensor:
        x = the_only_one(batch.views, "CMC")
        if not self.checked:  # once, for it waits for the device
            self.check_views(batch.views)
        split = zip(self.projectors, self.encoder.split(x), strict=True)
        return self.contrast([unit(project(h)) for project, h in split], batch.index)

    def check_views(self, views: list[Tensor]) -> None:
        """Refuse images that the encoder cannot split, such as gray ones by their colour."""
        self.encoder.check(the_only_one(views, "CMC"))
        self.checked = True

    def contrast(self, z: list[Tensor], index: Tensor) -> Tensor:
        """Unit features of each view, ``(B, d)``, of the images ``index`` (B,): every one against the others' banks."""
        self.fresh.append((index, [view.detach() for view in z]))
        drawn = self.banks[0].sample(index, self.negatives)  # (B, 1 + m), the same images for all views
        rows = [bank.slots[drawn] for bank in self.banks]  # (B, 1 + m, d) each
        return sum(self.pair(z[a], rows[b], self.log_z[a, b]) for a, b in permutations(range(len(z)), 2))

    def pair(self, z: Tensor, rows: Tensor, log_z: Tensor) -> Tensor:
        """Features of one view ``(B, d)`` against rows of another's bank ``(B, 1 + m, d)``."""
        scores = candidate_scores(z, rows, self.temperature)  # (B, 1 + m)
        if self.softmax:
            return first_of(scores)
        log_z.copy_(nce_log_z(scores, log_z, self.size))
        return nce(scores, log_z, self.size)

    def after_step(self) -> None:
        # The loss sees the rows of the last visit: they move only now.
        indices, features = zip(*self.fresh, strict=True)
        for bank, z in zip(self.banks, zip(*features, strict=True), strict=True):
            bank.update(torch.cat(indices), torch.cat(z))
        self.fresh.clear()

    def loss_at_chance(self) -> float:
        """Of equal scores, over all ordered pairs."""
        pairs = len(self.banks) * (len(self.banks) - 1)
        return pairs * (math.log(1 + self.negatives) if self.softmax else nce_at_chance(self.negatives))
