"""What the tasks share that train a network on the backbone's maps: detection, segmentation, keypoints."""

from collections.abc import Callable, Iterable

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from sslzoo.blocks import Encoder
from sslzoo.data.readable import Held, readable
from sslzoo.errors import UserError
from sslzoo.tasks.training import tell_skipped


def held_out(images: Held, on_error: str, read: Callable[[int], object] | None = None) -> Held:
    """The held-out images that can be read, see ``readable``; what is left out is said once."""
    kept, files = readable(images, on_error, read)
    if not rank_zero_only.rank:
        tell_skipped(files)
    return kept


def leave_out_unused(
    encoder: Encoder,
    forward: Callable[[Tensor], Iterable[Tensor]],
    side: int,
    backbone: str,
    setting: str,
    others: Iterable[nn.Parameter] = (),
) -> None:
    """Train no weight of ``encoder`` that ``forward`` does not need: ranks would wait for its gradient.

    A ViT's last norm, for one, comes after its maps.

    Args:
        encoder: the backbone.
        forward: from an image ``(1, 3, side, side)`` to what is learned from, in eval mode.
        side: of the images in pixels.
        backbone, setting: what the user typed for the encoder, and the name of what ``side`` comes from.
        others: weights that are needed all the same.

    Raises:
        UserError: if the encoder cannot see such images.
    """
    weight = next(encoder.parameters())
    try:
        outputs = forward(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
    except (AssertionError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        says = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"backbone={backbone} gives no maps of images of {side} pixels ({says}); take another backbone or {setting}"
        ) from error
    kept = {id(p) for p in others}
    weights = [p for p in encoder.parameters() if p.requires_grad and id(p) not in kept]
    total = torch.stack([output.sum() for output in outputs]).sum()
    for p, gradient in zip(weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
        p.requires_grad_(gradient is not None)
