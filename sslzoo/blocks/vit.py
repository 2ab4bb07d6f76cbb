"""What MoCo v3 does to a Vision Transformer: fixed positions, a frozen patch projection, its initial weights."""

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


def _xavier(fan_in: int, fan_out: int) -> tuple[float, float]:
    bound = math.sqrt(6 / (fan_in + fan_out))
    return -bound, bound
