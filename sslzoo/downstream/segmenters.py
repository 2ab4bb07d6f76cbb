"""Networks that name the class of every pixel, on any backbone's stage maps.

FCN (Long et al. 2015, arXiv 1411.4038), the FCN of MoCo's comparisons (He et al. 2020, 1911.05722, appendix), DeepLabV3
(Chen et al. 2017, 1706.05587), FPN (Kirillov et al. 2019, 1901.02446) and NAS-FPN (Ghiasi et al. 2019, 1904.07392, as
Zoph et al. 2020, 2006.06882, segment with it).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from sslzoo.blocks import Encoder
from sslzoo.downstream.nas_fpn import LEVELS, NASFPN
from sslzoo.downstream.necks import NORMS, SimplePyramid, StagePyramid, norm_layer, of_any_size
from sslzoo.errors import UserError
from sslzoo.losses import full

MODELS = ("fcn", "fcn_moco", "deeplabv3", "fpn", "nas_fpn")
WIDE = 256  # channels of the published heads of fcn_moco and deeplabv3


def build(
    model: str,
    encoder: Encoder,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int = 256,
    norm: str = "batch",
    repeats: int = 7,
) -> "Segmenter":
    """A segmenter that trains ``encoder``, with a new head.

    Args:
        model: one of ``MODELS``.
        encoder: any; the segmenter goes on with its very weights.
        classes: K, with background where the data have one.
        mean, std: what the encoder's images were normalised with.
        channels: of the pyramids of ``fpn`` and ``nas_fpn``.
        norm: in them: ``none``, ``group``, or ``batch``, which becomes SyncBatchNorm on more than one device.
        repeats: cells of ``nas_fpn``.

    Raises:
        UserError: on an unknown choice, or an encoder that does not fit ``model``.
    """
    for key, value, allowed in (("model", model, MODELS), ("norm", norm, NORMS)):
        if value not in allowed:
            raise UserError(f"task.{key}={value} is none of {', '.join(allowed)}")
    if classes < 2:
        raise UserError(f"a segmenter needs at least two classes to tell apart, these data have {classes}")
    for key, value in (("channels", channels), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"task.{key}={value} is too few; set it to 1 or more")
    encoder = of_any_size(encoder)
    if model == "fcn":
        head = OnLast(nn.Conv2d(encoder.widths[-1], classes, 1), *upsampling(classes, encoder.strides[-1]))
    elif model == "fcn_moco":
        encoder = dilated(encoder, model)
        head = OnLast(*moco_head(encoder.widths[-1], classes))
    elif model == "deeplabv3":
        if encoder.strides[-1] > 16:
            encoder = dilated(encoder, model)
        head = OnLast(DeepLabHead(encoder.widths[-1], classes, atrous_rates=(6, 12, 18)))  # of stride 16, sec. 3.3
    elif model == "fpn":
        head = FPN(encoder, classes, channels, norm)
    else:
        head = NASFPNHead(encoder, classes, channels, norm, repeats)
    return Segmenter(encoder, head, mean, std)


class Segmenter(nn.Module):
    """Images to scores: ``(B, 3, H, W) -> (B, K, H, W)``, in 0..1 and in at least float32.

    Images are padded below and on the right, with the mean, to a multiple of the encoder's stride; scores of a coarser
    grid are interpolated (bilinear).

    Args:
        encoder: gives stage maps.
        head: of all of them to scores on a grid that may be coarser than the image.
        mean, std: of the encoder's images.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.encoder, self.head = encoder, head
        plain = len(set(encoder.strides)) == 1
        self.divisible = max(encoder.strides) * (2 if plain else 1)  # the simple pyramid halves a plain encoder's map
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values)).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = (x - self.mean) / self.std
        x = F.pad(x, (0, -width % self.divisible, 0, -height % self.divisible))
        scores = full(self.head(self.encoder.maps(x)))
        if scores.shape[2:] != x.shape[2:]:
            scores = F.interpolate(scores, size=x.shape[2:], mode="bilinear")
        return scores[..., :height, :width]


def dilated(encoder: Encoder, model: str) -> Encoder:
    """The same encoder, its last stage at stride 1 and dilation 2: twice the resolution with the same weights.

    The first convolution of that stage still sees maps of the old density and is not dilated, as in timm and
    torchvision; MoCo dilates it too.

    Raises:
        UserError: if it has no stages, or timm cannot dilate them.
    """
    strides, name = encoder.strides, encoder.config["name"]
    kind = f"task.model={model} dilates the last stage of a backbone like ResNet or ConvNeXt, and {name}"
    if len(strides) < 2 or strides[-1] == strides[-2]:
        raise UserError(f"{kind} has none of half the resolution (strides {strides}); set task.model=fcn or fpn")
    options = {**encoder.config["options"], "output_stride": 16}
    try:
        new = type(encoder)(**{**encoder.config, "options": options})
    except TypeError as error:
        raise UserError(f"{kind} cannot be dilated in timm; set task.model=fcn or fpn") from error
    if new.strides != [*strides[:-1], strides[-2]]:
        raise UserError(f"{kind} has strides {strides}, dilated {new.strides}; set task.model=fcn or fpn")
    new.to(next(encoder.parameters()))  # its device and type
    new.load_state_dict(encoder.state_dict())  # strict: no key missing, none left over
    new.metadata = encoder.metadata
    return new


# Heads: from stage maps to scores


class OnLast(nn.Sequential):
    """Layers on the last map: ``[..., (B, D, h, w)] -> (B, K, ...)``."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return super().forward(maps[-1])


def moco_head(width: int, classes: int) -> list[nn.Module]:
    """Two 3x3 convolutions of dilation 6, and a 1x1: ``(B, width, h, w) -> (B, K, h, w)``."""
    layers: list[nn.Module] = []
    for before in (width, WIDE):
        conv = nn.Conv2d(before, WIDE, 3, padding=6, dilation=6, bias=False)
        layers += [conv, nn.BatchNorm2d(WIDE), nn.ReLU()]
    return [*layers, nn.Conv2d(WIDE, classes, 1)]


def upsampling(classes: int, stride: int) -> list[nn.Module]:
    """A transposed convolution for every prime factor of ``stride``: five of them double a map of stride 32."""
    layers, left = [], stride
    while left > 1:
        factor = next(f for f in range(2, left + 1) if left % f == 0)
        layers.append(BilinearUp(classes, factor))
        left //= factor
    return layers


class BilinearUp(nn.Module):
    """A transposed convolution that begins as bilinear interpolation: ``(B, K, h, w) -> (B, K, f h, f w)``.

    The border is repeated before, or scores would fade there.

    Args:
        channels: K.
        factor: f.
    """

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        kernel = 2 * factor - factor % 2
        self.conv = nn.ConvTranspose2d(channels, channels, kernel, factor, padding=(kernel - factor) // 2)
        distance = (torch.arange(kernel) - (kernel - 1) / 2).abs() / factor
        weights = torch.zeros_like(self.conv.weight)
        weights[range(channels), range(channels)] = torch.outer(1 - distance, 1 - distance)
        self.conv.weight.data.copy_(weights)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        y, edge = self.conv(F.pad(x, (1, 1, 1, 1), mode="replicate")), self.factor
        return y[..., edge:-edge, edge:-edge]


class FPN(nn.Module):
    """A pyramid from stride 4 on, its levels summed at the finest.

    Args:
        encoder: stages get an FPN, a plain encoder (ViT) the simple pyramid.
        classes: K.
        channels, norm: see ``build``.

    Raises:
        UserError: if the encoder has no maps to make one of.
    """

    def __init__(self, encoder: Encoder, classes: int, channels: int, norm: str):
        super().__init__()
        plain = len(set(encoder.strides)) == 1
        self.neck = SimplePyramid(encoder, channels, 4) if plain else StagePyramid(encoder, channels, norm, 4)
        self.predict = nn.Sequential(*conv3x3(channels, norm), nn.Conv2d(channels, classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = self.neck(maps)
        return self.predict(summed(levels, levels[0].shape[2:]))


class NASFPNHead(nn.Module):
    """NAS-FPN on levels 3 to 7, summed at the size of level 2, three 3x3 convolutions and a 1x1.

    Args:
        encoder: stages of strides 8, 16 and 32, or a plain one (ViT), whose map becomes them by the simple pyramid.
        classes: K.
        channels, norm, repeats: see ``build``.

    Raises:
        UserError: if the encoder has none of these.
    """

    def __init__(self, encoder: Encoder, classes: int, channels: int, norm: str, repeats: int):
        super().__init__()
        if len(set(encoder.strides)) == 1:
            self.simple: SimplePyramid | None = SimplePyramid(encoder, channels, 2 ** LEVELS[0])
            strides, widths = self.simple.strides, [channels] * len(self.simple.strides)
        else:
            self.simple, strides, widths = None, encoder.strides, encoder.widths
        self.skip = sum(stride < 2 ** LEVELS[0] for stride in strides)
        used = strides[self.skip :]
        if not used or used != [2**level for level in LEVELS[: len(used)]]:
            raise UserError(
                f"task.model=nas_fpn takes maps of strides 8, 16 and 32, and {encoder.config['name']} has {strides};"
                " set task.model=fcn or fpn"
            )
        self.nas_fpn = NASFPN(widths[self.skip :], channels, repeats, norm_layer(norm))
        convs = [layer for _ in range(3) for layer in conv3x3(channels, norm)]
        self.predict = nn.Sequential(*convs, nn.Conv2d(channels, classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        if self.simple is not None:
            maps = self.simple(maps)
        levels = self.nas_fpn(maps[self.skip :])
        size = [2 * side for side in levels[0].shape[2:]]
        return self.predict(summed(levels, size))


def conv3x3(channels: int, norm: str) -> list[nn.Module]:
    """A 3x3 convolution, its norm and ReLU."""
    make = norm_layer(norm)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=make is None)
    return [conv, *([] if make is None else [make(channels)]), nn.ReLU()]


def summed(levels: list[Tensor], size: Sequence[int]) -> Tensor:
    """The sum of all levels at ``size``: ``[(B, C, h, w) ...] -> (B, C, *size)``, interpolated (bilinear)."""
    return torch.stack([F.interpolate(level, size=list(size), mode="bilinear") for level in levels]).sum(0)
