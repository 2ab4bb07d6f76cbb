"""What MoCo v3 does to a Vision Transformer: fixed positions, a frozen patch projection, its initial weights, or
convolutions in place of that projection.
"""

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sslzoo.errors import UserError


def sincos_2d(height: int, width: int, dim: int) -> Tensor:
    """Sine and cosine positions of a grid, a zero row for the class token first: ``(1, 1 + height * width, dim)``.

    Four blocks of ``dim / 4`` channels with frequencies ``10000^(-4j / dim)``: sine and cosine of one coordinate,
    then of the other. Token n has coordinates ``(n // height, n % height)``, as in the released code: on a square
    grid the row comes first, and a grid that is not square is laid out as its transpose.

    Raises:
        UserError: if ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise UserError(f"positions of width {dim} do not split into four parts; use a ViT of a width divisible by 4")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.double) / (dim // 4))
    n = torch.arange(height * width)
    angles = [axis[:, None] * omega for axis in (n // height, n % height)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    return torch.cat([table.new_zeros(1, dim), table])[None].float()


@torch.no_grad()
def prepare_vit(net: nn.Module) -> None:
    """Make a timm ViT that of MoCo v3 (sec. 4): in place.

    Positions are ``sincos_2d``, the patch projection is random and frozen, linear layers are Xavier uniform (query,
    key and value as three matrices), the class token starts next to zero.

    Raises:
        UserError: if ``net`` is no timm ViT with a class token and a position for it.
    """
    is_vit = isinstance(net, VisionTransformer)
    if not is_vit or net.cls_token is None or net.reg_token is not None or net.no_embed_class:
        raise UserError(
            f"method.frozen_patches=true is for timm ViTs with a class token, {type(net).__name__} is none;"
            " set method.frozen_patches=false or encoder.name=vit_small_patch16_224"
        )
    if not isinstance(net.patch_embed.proj, nn.Conv2d):
        raise UserError(
            "method.frozen_patches=true freezes a patch projection, and encoder.stem=conv has none;"
            " set method.frozen_patches=false"
        )
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            out = layer.out_features // 3 if name.endswith("qkv") else layer.out_features
            nn.init.uniform_(layer.weight, *_xavier(layer.in_features, out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    projection = net.patch_embed.proj
    nn.init.uniform_(projection.weight, *_xavier(projection.weight[0].numel(), net.embed_dim))
    nn.init.zeros_(projection.bias)
    nn.init.normal_(net.cls_token, std=1e-6)
    net.pos_embed.copy_(sincos_2d(*net.patch_embed.grid_size, net.embed_dim))
    for fixed in (net.pos_embed, *net.patch_embed.parameters()):
        fixed.requires_grad_(False)


def convolutional_stem(net: nn.Module) -> None:
    """Give a timm ViT convolutions for its patch projection (Xiao et al. 2021, arXiv 2106.14881): in place.

    As many 3x3 ones of stride 2 as halve the image to its patches, each with half the channels of the next, BatchNorm
    and ReLU; then one of 1x1. The last block goes, which costs about as much.

    Raises:
        UserError: if ``net`` is no timm ViT, or its patches have a side that is no power of two.
    """
    side = net.patch_embed.patch_size[0] if isinstance(net, VisionTransformer) else 0
    halvings = side.bit_length() - 1
    if halvings < 1 or side != 2**halvings or len(net.blocks) < 2:
        raise UserError(
            f"encoder.stem=conv is for timm ViTs of two blocks or more with patches of 2, 4, 8, ... pixels,"
            f" {type(net).__name__} with patches of {side} is none: set encoder.stem=imagenet"
        )
    layers: list[nn.Module] = []
    before = 3
    for after in (net.embed_dim // 2 ** (halvings - 1 - i) for i in range(halvings)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    net.patch_embed.proj = nn.Sequential(*layers, nn.Conv2d(before, net.embed_dim, 1))
    net.blocks, net.feature_info = net.blocks[:-1], net.feature_info[:-1]


def _xavier(fan_in: int, fan_out: int) -> tuple[float, float]:
    bound = math.sqrt(6 / (fan_in + fan_out))
    return -bound, bound
