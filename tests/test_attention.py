"""Attention of the class token, against what timm itself computes."""

import numpy as np
import pytest
import torch

from sslzoo.blocks import Encoder
from sslzoo.report.attention import class_attention, has_class_token, strips

TINY = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 3, "dynamic_img_size": True}


def vit(**options) -> Encoder:
    encoder = Encoder("vit_tiny_patch16_224", options=TINY | options).eval()
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return encoder


def by_timm(encoder: Encoder, x):
    """The last block's whole attention, (B, heads, n, n), as timm's own unfused path computes it."""
    attn, seen = encoder.net.blocks[-1].attn, []
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, arguments, out: seen.append(out))
    with torch.no_grad():
        encoder(x)
    return seen[0]


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"reg_tokens": 2}, {"qkv_bias": False}], ids=str)
def test_attention_is_that_of_timms_last_block(options):
    encoder, x = vit(**options), torch.randn(2, 3, 16, 16)
    found = class_attention(encoder, x)
    prefix = 1 + options.get("reg_tokens", 0)
    expected = by_timm(encoder, x)[:, :, 0, prefix:].reshape(2, 3, 4, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.std() > 1e-3  # it does tell patches apart
    assert (found.sum((2, 3)) < 1).all()


def test_images_of_another_shape_have_another_grid():
    encoder, x = vit(), torch.randn(1, 3, 8, 24)
    torch.testing.assert_close(
        class_attention(encoder, x), by_timm(encoder, x)[:, :, 0, 1:].reshape(1, 3, 2, 6), rtol=1e-5, atol=1e-6
    )


def test_the_encoder_stays_as_it_was():
    encoder = vit().train()
    class_attention(encoder, torch.randn(1, 3, 16, 16))
    assert encoder.training
    assert not encoder.net.blocks[-1].attn._forward_pre_hooks


def test_only_vits_with_a_class_token_can_be_asked():
    assert has_class_token(vit())
    assert not has_class_token(vit(class_token=False, global_pool="avg"))
    assert not has_class_token(Encoder("resnet10t", stem="small", width=0.125))


def test_a_strip_shows_the_image_the_mean_and_every_head_on_its_own_scale():
    pictures = np.full((2, 4, 4, 3), 200, np.uint8)
    attention = np.zeros((2, 3, 2, 2), np.float32)
    attention[:, 0, 0, 0] = 1e-3  # one head looks to the upper left, a little
    sheet = np.asarray(strips(pictures, attention, side=8, gap=2).convert("RGBA")).astype(int)
    assert sheet.shape == (18, 5 * 10 - 2, 4)
    assert (sheet[:8, :8, :3] == 200).all()
    for start in (10, 20):  # the mean, and that head
        assert sheet[1, start + 1, :3].sum() > 2 * sheet[6, start + 6, :3].sum()
    assert (sheet[:8, 30:38, :3] == sheet[0, 30, :3]).all()  # a head that looks everywhere alike
    assert sheet[4, 9, 3] == 0  # nothing between the tiles
