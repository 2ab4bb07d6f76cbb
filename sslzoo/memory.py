"""What a method remembers of images it has seen: a queue of recent keys, or a bank with a slot an image.

Both are equal on every rank by construction (gather, then update), live in the checkpoint, and are exempt from
DDP's buffer broadcast: a bank of ImageNet is 656 MB.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslzoo.dist import all_gather
from sslzoo.errors import UserError
from sslzoo.views.draw import integers


class Queue(nn.Module):
    """First in, first out: the latest ``size`` keys (MoCo, sec. 3.1).

    Args:
        size: number of keys K; need not be a multiple of the batch.
        dim: width d of a key.

    Attributes:
        keys: ``(size, dim)``, unit rows; random directions until the queue has filled once.
        pointer: ``()`` int64, where the next key goes.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, z: Tensor) -> None:
        """Replace the oldest keys by the rows of all ranks: ``z`` is ``(B, d)``, any B.

        The keys become a new tensor, so a loss that still needs the old ones for its backward pass keeps them.
        """
        size = len(self.keys)
        z = all_gather(z).to(self.keys.dtype)
        slots = (self.pointer + torch.arange(len(z), device=z.device)) % size
        self.keys = self.keys.index_copy(0, slots[-size:], z[-size:])
        self.pointer = (self.pointer + len(z)) % size

    def check(self, batch_size: int) -> None:
        """Refuse a global batch that does not fit: keys would be gone before a loss has seen them.

        Raises:
            UserError: if it is larger than the queue.
        """
        if batch_size > len(self.keys):
            raise UserError(
                f"method.queue_size={len(self.keys)} does not hold the keys of a batch of {batch_size};"
                f" set method.queue_size to at least {batch_size}, or a smaller data.batch_size"
            )

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"


class Bank(nn.Module):
    """One slot per training image, a moving average of its features (InstDisc, sec. 3.2).

    Args:
        size: number of training images N.
        dim: width d of a feature.
        momentum: share of the old slot in the new one.

    Attributes:
        slots: ``(size, dim)``; row i belongs to training image i.
        updates: ``()`` int64, how often the bank moved; with the image's index it decides the negatives.
        seed: ``()`` int64, drawn once.
    """

    slots: Tensor
    updates: Tensor
    seed: Tensor

    def __init__(self, size: int, dim: int, momentum: float = 0.5):
        super().__init__()
        self.momentum = momentum
        bound = (3 / dim) ** 0.5  # uniform rows of norm about one, as in the official code
        self.register_buffer("slots", torch.empty(size, dim).uniform_(-bound, bound))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("seed", torch.randint(2**62, ()))

    @torch.no_grad()
    def sample(self, index: Tensor, negatives: int) -> Tensor:
        """Rows to contrast with: own first, then uniform with replacement; ``(B,) -> (B, 1 + negatives)``.

        A pure function of the image's index and the number of updates so far: the same on any rank, and whether
        a batch comes whole or in accumulated parts.
        """
        drawn = integers(self.seed, self.updates, index, negatives, len(self.slots))
        return torch.cat([index[:, None], drawn], dim=1)

    def draw(self, index: Tensor, negatives: int) -> Tensor:
        """Slots to contrast with, own slot first, without a gradient: ``(B,) -> (B, 1 + negatives, d)``."""
        return self.slots[self.sample(index, negatives)]

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor) -> None:
        """Move the slots of all ranks' images towards their new features: ``index`` (B,), ``z`` (B, d)."""
        index, z = all_gather(index), all_gather(z).to(self.slots.dtype)
        self.slots[index] = normalize(self.slots[index].lerp(z, 1 - self.momentum), dim=1)
        self.updates += 1

    def extra_repr(self) -> str:
        return f"size={self.slots.shape[0]}, dim={self.slots.shape[1]}, momentum={self.momentum}"


def memory_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of every Queue and Bank inside ``module``, by their name in its state dict."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, part in module.named_modules()
        if isinstance(part, (Queue, Bank))
        for key, buffer in part.named_buffers(recurse=False)
    }
