"""Encoders that split an image into views by its channels, with a network for each (CMC)."""

from collections.abc import Sequence

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from sslzoo.blocks.encoder import Encoder, _class_of
from sslzoo.errors import UserError
from sslzoo.losses import full

COLOURS = {"lab": (1, 2), "ycbcr": (1, 2), "edges": (1, 1), "none": ()}
"""What the channels of an image may become, and how many of them each view takes if nothing else is asked."""

# Middles and half ranges by channel. Lab's are of the sRGB gamut and YCbCr's as in CMC's code; those of luminance
# and of Sobel's magnitude are ours, roughly what photographs have.
RANGES = {
    "lab": ((50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),
    "ycbcr": ((116.151, 121.080, 132.342), (109.500, 111.855, 111.964)),
    "edges": ((0.5, 0.1), (0.25, 0.1)),
}


class LabEncoder(Encoder):
    """Two to four views of one image, split by channel, each with a network of its own: ``(B, C, H, W) -> (B, D)``.

    RGB images arrive normalised as for any encoder; colours are converted here. Each network has ``width / views``
    of a ResNet's channels, so D is that of one whole network. (The official ResNet v1 is half as wide as well, but
    for its stem.) Networks that have no ``width`` keep theirs, and D grows.

    Args:
        name, stem, width, norm, options: as for Encoder; ``width`` of all networks together.
        colour: ``lab`` gives L | ab; ``ycbcr`` Y | CbCr; ``edges`` luminance | Sobel magnitude, for gray images;
            ``none`` leaves the input as it is, e.g. RGB and depth as four channels.
        channels: how many channels each view takes, e.g. ``[3, 1]`` for RGB and depth, or ``[1, 1, 1]`` for L | a | b;
            null: as written above.
        mean, std: what RGB was normalised with.

    Attributes:
        dims: width of each view's features; ``dim`` is their sum.

    Raises:
        UserError: on an unknown ``colour``, or ``channels`` that do not fit it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "resnet50",
        stem: str = "imagenet",
        width: float = 1.0,
        norm: str = "batch",
        options: dict | None = None,
        colour: str = "lab",
        channels: Sequence[int] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        split = _checked(colour, channels)
        views = len(split)
        narrow = width / views if _has_width(name) else width
        alike = {"name": name, "stem": stem, "width": narrow, "norm": norm, "options": options}
        super().__init__(**alike)
        nets = [self.net, *(Encoder(**alike).net for _ in split[1:])]
        for net, count in zip(nets, split, strict=True):
            _take_channels(net, count)
        self.net = nn.ModuleList(nets)
        self.colour, self.channels = colour, split
        self.dims = [self.dim] * views
        self.dim *= views
        self.widths = [views * channels for channels in self.widths]
        self.config |= {"width": width, "colour": colour, "channels": split}
        self.config |= {"mean": list(mean), "std": list(std)}
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.split(x), dim=1)

    def split(self, x: Tensor) -> list[Tensor]:
        """Features of each view: ``(B, C, H, W) -> [(B, dims[v]) ...]``."""
        return [net(view) for net, view in zip(self.net, self.views(x), strict=True)]

    def maps(self, x: Tensor) -> list[Tensor]:
        """Stage maps of all views, side by side: ``(B, C, H, W) -> [(B, widths[s], H / strides[s], ...) ...]``."""
        stages = len(self.widths)
        each = [
            net.forward_intermediates(view, indices=stages, intermediates_only=True)
            for net, view in zip(self.net, self.views(x), strict=True)
        ]
        return [torch.cat(maps, dim=1) for maps in zip(*each, strict=True)]

    @torch.no_grad()
    def views(self, x: Tensor) -> list[Tensor]:
        """The views themselves: ``(B, C, H, W) -> [(B, channels[v], H, W) ...]``.

        Raises:
            UserError: if the images have another number of channels.
        """
        needed = sum(self.channels) if self.colour == "none" else 3
        if x.shape[1] != needed:
            raise UserError(
                f"encoder.colour={self.colour} with encoder.channels={self.channels} needs images of {needed} channels,"
                f" these have {x.shape[1]}; change encoder.channels"
            )
        if self.colour != "none":
            middle, half = (x.new_tensor(c, dtype=full(x).dtype).view(-1, 1, 1) for c in RANGES[self.colour])
            x = ((CONVERT[self.colour](self.rgb(x)) - middle) / half).to(x.dtype)
        return list(x.split(self.channels, dim=1))

    def rgb(self, x: Tensor) -> Tensor:
        """Normalised images back in 0..1."""
        return (full(x) * self.std + self.mean).clamp(0, 1)

    def check(self, x: Tensor) -> None:
        """Refuse images of other channels, and a batch of gray ones where views are split by colour: one view would be
        empty. Waits for the GPU.
        """
        self.views(x[:1])
        if self.colour in ("lab", "ycbcr") and (self.rgb(x).amax(1) - self.rgb(x).amin(1)).max() < 1 / 255:
            raise UserError(
                f"encoder.colour={self.colour} splits colour from luminance, but no image of the first batch has any"
                " colour; set encoder.colour=edges"
            )


def lab(rgb: Tensor) -> Tensor:
    """CIE Lab under D65 of sRGB in 0..1: ``(B, 3, H, W) -> (B, 3, H, W)``; L in 0..100."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    white = rgb.new_tensor([0.95047, 1.0, 1.08883]).view(-1, 1, 1)
    xyz = _mixed(linear, to_xyz) / white
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def ycbcr(rgb: Tensor) -> Tensor:
    """Studio-range YCbCr (ITU-R BT.601) of RGB in 0..1: ``(B, 3, H, W) -> (B, 3, H, W)``; Y in 16..235."""
    weights = [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]
    return _mixed(rgb, weights) + rgb.new_tensor([16.0, 128.0, 128.0]).view(-1, 1, 1)


def edges(rgb: Tensor) -> Tensor:
    """Luminance and the magnitude of its Sobel gradient: ``(B, 3, H, W) -> (B, 2, H, W)``."""
    y = _mixed(rgb, [[0.299, 0.587, 0.114]])
    down = y.new_tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]) / 4
    with torch.autocast(y.device.type, enabled=False):
        slopes = F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), torch.stack([down, down.T])[:, None])
    return torch.cat([y, slopes.square().mean(1, keepdim=True).sqrt()], dim=1)


CONVERT = {"lab": lab, "ycbcr": ycbcr, "edges": edges}


def _mixed(x: Tensor, weights: list[list[float]]) -> Tensor:
    """Channels as weighted sums of channels, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, x.new_tensor(weights)[:, :, None, None])


def _checked(colour: str, channels: Sequence[int] | None) -> list[int]:
    if colour not in COLOURS:
        raise UserError(f"encoder.colour={colour} is none of {', '.join(COLOURS)}")
    split = list(channels or COLOURS[colour])
    total = sum(split) if colour == "none" else sum(COLOURS[colour])
    if not 2 <= len(split) <= 4 or min(split) < 1 or sum(split) != total:
        need = "must list" if colour == "none" else f"must divide {total} channels into"
        raise UserError(f"encoder.channels={split} with encoder.colour={colour} {need} two to four views, e.g. [1, 2]")
    return split


def _has_width(name: str) -> bool:
    return timm.is_model(name) and _class_of(name) is ResNet


def _take_channels(net: nn.Module, count: int) -> None:
    """Let a timm model's first convolution take ``count`` channels, initialised as the one it replaces."""
    path, conv = next((path, part) for path, part in net.named_modules() if isinstance(part, nn.Conv2d))
    new = nn.Conv2d(
        count, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None
    )  # fmt: skip
    nn.init.normal_(new.weight, std=conv.weight.std().item())
    if conv.bias is not None:
        nn.init.zeros_(new.bias)
    net.set_submodule(path, new)
