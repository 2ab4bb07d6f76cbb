"""An encoder that sees an image as a grid of overlapping patches, each on its own (CPC)."""

import torch
from timm.layers import BatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from sslzoo.blocks.encoder import Encoder
from sslzoo.errors import UserError

NORMS = ("layer", "none")
DRAWS = 9  # random numbers that decide what happens to a patch


class PatchEncoder(Encoder):
    """Patches, encoded one by one and averaged: ``(B, 3, H, W) -> (B, D)``.

    BatchNorm is replaced: through its statistics patches would know of each other, and CPC's task be solved without
    looking (CPC v2, sec. 3).

    Args:
        name, stem, width, options: as for Encoder.
        patch: side of a patch in pixels.
        stride: pixels from one patch to the next.
        norm: ``layer``, over all of a patch's channels and places (v2), or ``none`` (v1).
        stages: a ResNet's stages to keep; 3 as in both papers, 4 for all.

    Raises:
        UserError: on an unknown ``norm``, or ``stages`` that the model does not have.
    """

    def __init__(
        self,
        name: str = "resnet50",
        stem: str = "imagenet",
        width: float = 1.0,
        options: dict | None = None,
        patch: int = 64,
        stride: int = 32,
        norm: str = "layer",
        stages: int = 3,
    ):
        super().__init__(name, stem, width, options=options)
        if norm not in NORMS:
            raise UserError(f"encoder.norm={norm} is none of {', '.join(NORMS)}")
        if not 1 <= stages <= 4 or (stages < 4 and not isinstance(self.net, ResNet)):
            raise UserError(f"encoder.stages={stages} does not fit {name}: a ResNet has 1 to 4, others only all 4")
        self.patch, self.stride = patch, stride
        self.config |= {"patch": patch, "stride": stride, "norm": norm, "stages": stages}
        for stage in range(stages, 4):
            setattr(self.net, f"layer{stage + 1}", nn.Identity())
        self.widths, self.strides = self.widths[:stages], self.strides[:stages]
        self.dim = self.widths[-1] if stages < 4 else self.dim
        _without_batchnorm(self.net, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid(x).mean((1, 2))

    def grid(self, x: Tensor) -> Tensor:
        """Features of each patch: ``(B, 3, H, W) -> (B, G, G, D)``."""
        return self.encode(self.patches(x))

    def patches(self, x: Tensor) -> Tensor:
        """The patches themselves, row by row: ``(B, C, H, W) -> (B, G, G, C, patch, patch)``.

        Raises:
            UserError: if they do not cover the image exactly, or make fewer than 3 x 3.
        """
        for side in x.shape[2:]:
            if side < self.patch + 2 * self.stride or (side - self.patch) % self.stride:
                fits = self.patch + max(2, round((side - self.patch) / self.stride)) * self.stride
                raise UserError(
                    f"patches of {self.patch} pixels every {self.stride} do not fill a grid of 3 x 3 or more on an"
                    f" image of {side}; set image_size={fits}, or encoder.patch and encoder.stride"
                )
        windows = x.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)  # (B, C, G, G, patch, patch)
        return windows.permute(0, 2, 3, 1, 4, 5)

    def encode(self, patches: Tensor) -> Tensor:
        """Features of patches, ``(B, G, G, C, patch, patch) -> (B, G, G, D)``."""
        return self.net(patches.flatten(0, 2)).view(*patches.shape[:3], self.dim)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Stage maps as Encoder's, of the network run over the whole image."""
        return self.net.forward_intermediates(x, indices=4, intermediates_only=True)[: len(self.widths)]


def distorted(
    patches: Tensor, drawn: Tensor, crop: int = 0, drop: float = 0.0, flip: bool = False, jitter: float = 0.0
) -> Tensor:
    """Patches distorted one by one, lest continued edges and lens colours solve the task; shapes stay.

    Args:
        patches: ``(B, G, G, C, P, P)``, normalised, so that a cleared pixel is the mean colour.
        drawn: uniform integers in [0, 2^32) to decide by, ``(B, G * G * DRAWS)``.
        crop: keep a random window that is so many pixels smaller, and clear the rest (v1: 60 of 64 pixels).
        drop: probability that a patch keeps but one of its channels (v2).
        flip: mirror half of the patches (v2).
        jitter: change the logarithm of a patch's contrast, and the level of each of its three channels, by up to this
            either way; a plain stand-in for v2's colour transforms of patches (sec. 4 there).
    """
    b, rows, columns, channels, side, _ = patches.shape
    u = drawn.view(b, rows, columns, DRAWS)
    if flip:
        patches = torch.where(_per_patch(u[..., 4] % 2 == 0), patches.flip(-1), patches)
    if jitter:
        change = jitter * (2 * u[..., 5:] / 2**32 - 1).to(patches.dtype)[..., None, None]  # (B, G, G, 4, 1, 1)
        patches = patches * change[..., :1, :, :].exp() + change[..., 1 : 1 + channels, :, :]
    if crop:
        place = torch.arange(side, device=patches.device)
        top, left = u[..., 0, None] % (crop + 1), u[..., 1, None] % (crop + 1)  # (B, G, G, 1)
        inside_rows = (place >= top) & (place < top + side - crop)  # (B, G, G, P)
        inside_columns = (place >= left) & (place < left + side - crop)
        patches = patches * (inside_rows[..., None, :, None] & inside_columns[..., None, None, :])
    if drop:
        kept = torch.arange(channels, device=patches.device) == u[..., 2, None] % channels  # (B, G, G, C)
        patches = patches * (kept | (u[..., 3, None] >= drop * 2**32))[..., None, None]
    return patches


def _per_patch(x: Tensor) -> Tensor:
    return x[..., None, None, None]


def _without_batchnorm(module: nn.Module, norm: str) -> None:
    for name, child in module.named_children():
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            _without_batchnorm(child, norm)
            continue
        new: nn.Module = nn.Identity()
        if norm == "layer":
            new = nn.GroupNorm(1, child.num_features)
            new.weight, new.bias = child.weight, child.bias
        setattr(module, name, nn.Sequential(new, child.act) if isinstance(child, BatchNormAct2d) else new)
    # Nothing tames a residual branch without a norm: each starts at zero, or their sum doubles with every block.
    if norm == "none" and isinstance(module, BasicBlock | Bottleneck):
        nn.init.zeros_((module.conv3 if isinstance(module, Bottleneck) else module.conv2).weight)
