"""Where a Vision Transformer looks: the class token's attention in the last block (DINO, fig. 1)."""

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from sslzoo.blocks.encoder import Encoder


def has_class_token(encoder: nn.Module) -> bool:
    """Whether ``class_attention`` can be asked of ``encoder``: a timm ViT with a class token."""
    net = encoder.net
    return (
        isinstance(net, VisionTransformer) and net.cls_token is not None and isinstance(net.blocks[-1].attn, Attention)
    )


@torch.no_grad()
def class_attention(encoder: Encoder, x: Tensor) -> Tensor:
    """Attention of the class token over patches, in the last block: ``(B, 3, H, W) -> (B, heads, h, w)``.

    A head's numbers sum to at most one; what is missing it pays to the class token and registers.
    """
    net, seen = encoder.net, []
    attn = net.blocks[-1].attn
    hook = attn.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    training = encoder.training
    try:
        encoder.eval()(x)
    finally:
        hook.remove()
        encoder.train(training)
    tokens = seen[0]  # (B, 1 + registers + h w, D)
    b, n, _ = tokens.shape
    q, k, _ = attn.qkv(tokens).view(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)  # (B, heads, n, d)
    weights = (q[:, :, :1] @ k.mT * attn.scale).softmax(-1)[:, :, 0]  # (B, heads, n)
    step = net.patch_embed.patch_size
    grid = -(-x.shape[2] // step[0]), -(-x.shape[3] // step[1])
    return weights[:, :, -grid[0] * grid[1] :].unflatten(-1, grid)


HEAT = np.array([[13, 8, 60], [110, 30, 110], [205, 70, 80], [250, 160, 60], [252, 250, 190]], float)


def strips(pictures: np.ndarray, attention: np.ndarray, side: int = 72, gap: int = 4) -> Image.Image:
    """A row an image: itself, the mean over heads, and each head.

    Args:
        pictures: ``(B, H, W, 3)`` uint8.
        attention: ``(B, heads, h, w)``; each map is shown on its own scale, dark to light.
    """
    shown = np.concatenate([attention.mean(1, keepdims=True), attention], axis=1)
    low, high = shown.min((2, 3), keepdims=True), shown.max((2, 3), keepdims=True)
    scaled = (shown - low) / np.maximum(high - low, 1e-12) * (len(HEAT) - 1)
    below = np.minimum(scaled.astype(int), len(HEAT) - 2)
    share = (scaled - below)[..., None]
    heat = ((1 - share) * HEAT[below] + share * HEAT[below + 1]).astype(np.uint8)  # (B, 1 + heads, h, w, 3)
    rows, columns = len(pictures), 1 + heat.shape[1]
    sheet = Image.new("RGBA", (columns * (side + gap) - gap, rows * (side + gap) - gap))
    for i in range(rows):
        for j in range(columns):
            tile = Image.fromarray(pictures[i] if j == 0 else heat[i, j - 1])
            sheet.paste(tile.resize((side, side), Image.Resampling.NEAREST), (j * (side + gap), i * (side + gap)))
    return sheet
