"""From an image to the maps a detector works on: the encoder, and a pyramid or none on its stages.

FPN (Lin et al. 2017, arXiv 1612.03144), the simple pyramid of ViTDet (Li et al. 2022, 2203.16527), GroupNorm (Wu and He
2018, 1803.08494).
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from sslzoo.blocks import Encoder
from sslzoo.errors import UserError
from sslzoo.losses import full

NORMS = ("none", "group", "batch")
Norm = Callable[[int], nn.Module] | None


def of_any_size(encoder: Encoder) -> Encoder:
    """``encoder``, or one of the same weights that takes images of any size: ViT and Swin insist on one by default."""
    if getattr(encoder.net, "dynamic_img_size", True):
        return encoder
    options = {**encoder.config["options"], "dynamic_img_size": True}
    new = type(encoder)(**{**encoder.config, "options": options})
    new.load_state_dict(encoder.state_dict())  # strict: no key missing, none left over
    new.metadata = encoder.metadata
    return new.to(next(encoder.parameters()).device)


class C4(nn.Module):
    """The encoder up to its last stage but one: ``(B, 3, H, W) -> {"0": (B, out_channels, H / s, W / s)}``.

    Args:
        encoder: a ResNet; its last stage is left to the head.
        model: for the message.

    Raises:
        UserError: if it is no whole ResNet.
    """

    def __init__(self, encoder: Encoder, model: str):
        super().__init__()
        if not isinstance(encoder.net, ResNet) or len(encoder.widths) < 4:
            kind = f"{encoder.config['name']} as {type(encoder).__name__}"
            raise UserError(
                f"task.model={model} takes a ResNet's last stage as its head, and {kind} has none to give;"
                f" set task.model={model.replace('c4', 'fpn')}"
            )
        self.encoder = encoder
        self.out_channels = encoder.widths[-2]
        self.strides = [encoder.strides[-2]]
        self.divisible = self.strides[0]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        (c4,) = self.encoder.net.forward_intermediates(x, indices=[3], stop_early=True, intermediates_only=True)
        return OrderedDict([("0", full(c4))])


class Pyramid(nn.Module):
    """The encoder and a feature pyramid on it: ``(B, 3, H, W) -> {"0": (B, channels, H / strides[0], ...), ...}``.

    An encoder whose stages have several strides gets an FPN, a plain one (ViT) the simple pyramid of ViTDet; levels
    go on by strided convolutions (one-stage) or subsampling (R-CNN) to where anchors are as large as images. Large
    images have the papers' levels: strides 8 to 128 for one-stage detectors, 4 to 64 for an R-CNN. Images of less
    than 400 pixels begin at stride 4, with anchors of 4 x stride.

    Args:
        encoder: any with stage maps.
        model: one-stage or R-CNN.
        size: of the images' shorter side.
        channels: of every level.
        norm: see ``build``.

    Attributes:
        out_channels: the same.
        strides: of the levels.
        anchor: side of an anchor, in strides.
        pooled: names of the levels that regions are cut from.
        divisible: images are padded to a multiple of this.

    Raises:
        UserError: if the encoder has no maps at these strides.
    """

    def __init__(self, encoder: Encoder, model: str, size: int, channels: int, norm: str):
        super().__init__()
        two_stages, large = "rcnn" in model, size >= 400
        finest = 8 if large and not two_stages else 4
        self.anchor = 8 if large and two_stages else 4
        self.encoder, self.out_channels = encoder, channels
        plain = len(set(encoder.strides)) == 1
        self.neck = SimplePyramid(encoder, channels, finest) if plain else StagePyramid(encoder, channels, norm, finest)
        strides = list(self.neck.strides)
        self.pooled = [str(level) for level in range(len(strides))]
        self.divisible = strides[-1]
        # Up to anchors of 0.8 of the image: 512 pixels of 640 to 800, as in the papers
        while 2 * self.anchor * strides[-1] <= 0.8 * size:
            strides.append(2 * strides[-1])
        self.strides = strides
        more = len(strides) - len(self.neck.strides)
        self.coarser = nn.ModuleList() if two_stages else nn.ModuleList(_halving(channels) for _ in range(more))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = [full(level) for level in self.neck(self.encoder.maps(x))]
        for i in range(len(self.strides) - len(levels)):
            last = levels[-1]
            if not len(self.coarser):
                levels.append(F.max_pool2d(last, kernel_size=1, stride=2))
            else:
                levels.append(full(self.coarser[i](last.relu() if i else last)))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


class StagePyramid(nn.Module):
    """FPN on the stages of stride ``finest`` or more: the encoder's maps in, levels out.

    Attributes:
        strides: of the levels.
    """

    def __init__(self, encoder: Encoder, channels: int, norm: str, finest: int):
        super().__init__()
        self.skip = sum(stride < finest for stride in encoder.strides)
        self.strides = encoder.strides[self.skip :]
        if not self.strides or self.strides != sorted(set(self.strides)):
            raise UserError(
                f"{encoder.config['name']} has maps at strides {encoder.strides}, of which no pyramid from {finest}"
                " upwards can be made; take a backbone like a ResNet, ConvNeXt, Swin or ViT"
            )
        self.fpn = FeaturePyramidNetwork(encoder.widths[self.skip :], channels, norm_layer=norm_layer(norm))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        named = OrderedDict((str(i), stage) for i, stage in enumerate(maps[self.skip :]))
        return list(self.fpn(named).values())


class SimplePyramid(nn.Module):
    """ViTDet's pyramid (Li et al. 2022, arXiv 2203.16527, sec. 3): the last map, up- and down-sampled.

    ``[..., (B, D, H / p, W / p)] -> [(B, channels, H / s, W / s) for s in (p / 4, p / 2, p, 2p)]``, each by
    deconvolutions or pooling, then a 1x1 and a 3x3 convolution with LayerNorm. Levels below stride ``finest`` are
    left out.

    Attributes:
        strides: s.
    """

    def __init__(self, encoder: Encoder, channels: int, finest: int):
        super().__init__()
        dim, stride = encoder.widths[-1], encoder.strides[-1]
        if dim % 4 or stride % 4:
            raise UserError(
                f"{encoder.config['name']} has {dim} channels at stride {stride}, which do not split into four; the"
                " simple pyramid needs patches of 4, 8, 16 or 32 pixels"
            )
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        every = {
            stride // 4: ([up(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), up(dim // 2, dim // 4)], dim // 4),
            stride // 2: ([up(dim, dim // 2)], dim // 2),
            stride: ([], dim),
            2 * stride: ([nn.MaxPool2d(2)], dim),
        }
        scales = {s: layers for s, layers in every.items() if s >= min(finest, 2 * stride)}
        self.strides = list(scales)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scale,
                nn.Conv2d(width, channels, kernel_size=1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for scale, width in scales.values()
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [level(maps[-1]) for level in self.levels]


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over channels: ``(B, C, H, W) -> (B, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _halving(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)
    return conv


def norm_layer(norm: str) -> Norm:
    """What makes a norm of so many channels, by its name in ``NORMS``; None for ``none``."""
    if norm == "none":
        return None
    return nn.BatchNorm2d if norm == "batch" else group_norm


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32, as autocast has it on a GPU; on a CPU bfloat16 takes four times as long here."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(full(x)).to(x.dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm in groups of 8 channels or more, 32 of them at most (Wu and He 2018)."""
    return GroupNorm(math.gcd(32, max(1, channels // 8), channels), channels)
