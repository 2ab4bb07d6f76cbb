"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al. 2020,
arXiv 2006.09882).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslzoo.blocks import MLP, Encoder
from sslzoo.blocks.crops import at_least_two, by_resolution
from sslzoo.blocks.prototypes import Prototypes, sinkhorn
from sslzoo.dist import mine, world
from sslzoo.errors import UserError
from sslzoo.losses import swapped_cross_entropy, unit
from sslzoo.memory import Queue
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim

ASSIGNED = 2  # views whose codes are computed: the full ones, which come first


class SwAV(Method):
    """Cluster while learning: the code of one view must be predictable from every other view.

    ``L = mean over i in {0, 1}, v != i of -sum_k q_i[k] log softmax(s_v / T)[k]`` with scores ``s = C z`` against
    unit prototypes C and codes ``q = sinkhorn(s)``, which spread the batch evenly over the prototypes (eq. 1, 2).

    Args:
        encoder: f; runs once per resolution.
        optim: the recipe's optimizer.
        hidden: width of the projector's hidden layer.
        dim: width of z.
        prototypes: K.
        temperature: T.
        epsilon: smoothness of the codes.
        iterations: of Sinkhorn.
        queue_size: past projections of each of the two full views that take part in Sinkhorn, over all ranks, once
            there are as many; 0 where the batch alone is large against K.
        queue_start: epoch at which the queues begin to fill.
        freeze_prototypes: epochs at the start in which the prototypes receive no gradient; a fraction counts.

    Raises:
        UserError: if Sinkhorn's settings give no codes, or an image has fewer than two views.
    """

    accumulates = False  # codes are balanced over the batch
    sync_batchnorm = True
    queues: Sequence[Queue]

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        hidden: int = 2048,
        dim: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue_size: int = 0,
        queue_start: float = 15,
        freeze_prototypes: float = 1,
    ):
        super().__init__(encoder, optim)
        if iterations < 1 or epsilon <= 0:
            raise UserError(
                f"method.iterations={iterations} and method.epsilon={epsilon} give no codes;"
                " Sinkhorn needs at least 1 iteration and an epsilon above 0, e.g. 3 and 0.05"
            )
        self.projector = MLP(encoder.dim, hidden, dim, norm="batch", bias=True)
        self.prototypes = Prototypes(dim, prototypes)
        self.queues = nn.ModuleList(Queue(queue_size, dim) for _ in range(ASSIGNED if queue_size else 0))  # type: ignore
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.queue_size, self.queue_start, self.freeze_prototypes = queue_size, queue_start, freeze_prototypes
        self.fresh: list[Tensor] = []  # projections of this optimizer step, not yet in the queues

    def loss(self, batch: Batch) -> Tensor:
        views = at_least_two(batch.views, "SwAV")
        z = unit(self.projector(by_resolution(self.encoder, views)))  # (V * B, d), BatchNorm over all crops
        z = z.unflatten(0, (len(views), -1))  # (V, B, d)
        s = self.prototypes(z)  # (V, B, K)
        q = self.codes(s)  # (2, B, K)
        self.fresh = [*z[:ASSIGNED].detach()]
        return swapped_cross_entropy(s, q, self.temperature)

    def check(self, batch_size: int) -> None:
        """Refuse a global batch that the queues do not hold."""
        for queue in self.queues:
            queue.check(batch_size)

    @torch.no_grad()
    def codes(self, s: Tensor) -> Tensor:
        """Codes of the full views, balanced over the world's batch and the queues: ``(V, B, K) -> (2, B, K)``."""
        batch, pools = s.shape[1], [*s[:ASSIGNED]]
        # Filled or not is a matter of steps, not of values: nothing is read back from the device.
        if self.queues and (self.step - self.first_step(self.queue_start)) * world() * batch >= self.queue_size:
            # A rank brings its own share of the queue, as it does of the batch.
            pools = [torch.cat([x, self.prototypes(mine(q.keys))]) for x, q in zip(pools, self.queues, strict=True)]
        return torch.stack([sinkhorn(x, self.epsilon, self.iterations)[:batch] for x in pools])

    def parameter_groups(self) -> list[dict]:
        return self.optim.groups(self.parameters(), later=self.prototypes.parameters())

    def before_step(self) -> None:
        if self.step < self.first_step(self.freeze_prototypes):
            self.prototypes.zero_grad()  # to None: neither weight decay nor momentum moves them

    def after_step(self) -> None:
        if self.queues and self.step >= self.first_step(self.queue_start):
            for queue, z in zip(self.queues, self.fresh, strict=True):
                queue.push(z)
        self.fresh = []
        self.prototypes.normalise()  # officially at the start of the next step: the same moment

    def loss_at_chance(self) -> float:
        """All scores equal: ``ln K``."""
        return math.log(len(self.prototypes.weight))
