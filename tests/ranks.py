"""The same training steps on one rank, on several, and in accumulated parts."""

from collections.abc import Callable, Sequence

import torch

from conftest import on_ranks
from sslzoo import dist
from sslzoo.method import Batch, Method


def random_batches(steps: int, size: int, shapes: Sequence[tuple[int, ...]], images: int = 64) -> list[Batch]:
    """``steps`` batches of ``size`` rows, one float64 view of each of ``shapes``; no image twice in a batch."""
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            [torch.randn(size, *shape, generator=generator, dtype=torch.double) for shape in shapes],
            torch.randperm(images, generator=generator)[:size],
            torch.full((size,), -1),
        )
        for _ in range(steps)
    ]


def rows(batch: Batch, part: int, parts: int) -> Batch:
    """The ``part``-th of ``parts`` equal shares of a batch."""
    return Batch(
        [x.chunk(parts)[part] for x in batch.views], batch.index.chunk(parts)[part], batch.label.chunk(parts)[part]
    )


def train(method: Method, batches: list[Batch], accumulate: int = 1) -> dict:
    """Take one optimizer step a batch as the trainer does; each batch is the world's, a rank takes its share.

    Returns the losses (mean over ranks and parts), the last gradients, and the final state dict.
    """
    optimizer = method.optim.build(method.parameter_groups())
    method.steps, losses = len(batches), []
    for step, batch in enumerate(batches):
        method.step = step
        optimizer.zero_grad()
        share = rows(batch, dist.rank(), dist.world())
        total = 0.0
        for part in range(accumulate):
            loss = method.loss(rows(share, part, accumulate)) / accumulate
            loss.backward()
            total += loss.detach()
        losses.append(float(dist.all_mean(total)))
        grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        for grad in grads.values():  # what DDP does
            grad.copy_(dist.all_mean(grad))
        method.optim.set(optimizer, step, method.steps, 1)
        method.before_step()
        optimizer.step()
        with torch.no_grad():
            method.after_step()
    return {"losses": losses, "grads": grads, "state": method.state_dict()}


def _train_rank(rank: int, make: Callable[[], Method], batches: list[Batch]) -> dict:
    torch.manual_seed(0)
    return train(make(), batches)


def train_on_ranks(world: int, make: Callable[[], Method], batches: list[Batch]) -> list[dict]:
    """``train`` on ``world`` gloo ranks; ``make`` is a module-level function that builds the method."""
    return on_ranks(world, _train_rank, make, batches)


def train_alone(make: Callable[[], Method], batches: list[Batch], accumulate: int = 1) -> dict:
    """``train`` in this process, from the same initial state as every rank."""
    torch.manual_seed(0)
    return train(make(), batches, accumulate)


def assert_same(a: dict, b: dict, skip: Sequence[str] = (), rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Losses, gradients and states agree; names containing one of ``skip`` are left out."""
    torch.testing.assert_close(a["losses"], b["losses"], rtol=rtol, atol=atol)
    for what in ("grads", "state"):
        assert a[what].keys() == b[what].keys()
        for name, value in a[what].items():
            if not any(part in name for part in skip):
                torch.testing.assert_close(
                    value, b[what][name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
                )
