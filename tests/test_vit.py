"""MoCo v3's Vision Transformer: positions, frozen patches, initial weights."""

import math

import pytest
import torch

from sslzoo.blocks.encoder import Encoder
from sslzoo.blocks.vit import prepare_vit, sincos_2d
from sslzoo.errors import UserError

OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(**more) -> Encoder:
    encoder = Encoder("vit_tiny_patch16_224", options=OPTIONS | more)
    prepare_vit(encoder.net)
    return encoder


def test_positions_of_a_square_grid_have_the_row_first():
    table = sincos_2d(3, 3, 8)[0]
    assert table.shape == (10, 8)
    assert (table[0] == 0).all()
    for row in range(3):
        for column in range(3):
            angles = [row, row / 100, column, column / 100]  # 10000^(-2 * 4 / 8) = 1 / 100
            expected = [f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair]
            torch.testing.assert_close(table[1 + 3 * row + column], torch.tensor(expected))


def test_positions_need_a_width_of_four_parts():
    with pytest.raises(UserError, match="width 30"):
        sincos_2d(2, 2, 30)


def test_prepared_vit_has_fixed_positions_and_patches():
    net = vit().net
    assert torch.equal(net.pos_embed.data, sincos_2d(4, 4, 32))
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert net.cls_token.requires_grad
    assert net.cls_token.abs().max() < 1e-5


def test_initial_weights_fill_their_xavier_bounds():
    net = vit().net
    for weight, bound in (
        (net.patch_embed.proj.weight, math.sqrt(6 / (3 * 8 * 8 + 32))),
        (net.blocks[0].attn.qkv.weight, math.sqrt(6 / (32 + 32))),  # three square matrices, not one
        (net.blocks[1].mlp.fc1.weight, math.sqrt(6 / (32 + 128))),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert all((p == 0).all() for name, p in net.named_parameters() if name.endswith("bias"))


def test_small_crops_pass_where_the_size_is_dynamic():
    encoder = vit(dynamic_img_size=True)
    assert encoder(torch.randn(2, 3, 16, 16)).shape == encoder(torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize(
    "options", [{"reg_tokens": 2}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}]
)
def test_other_token_layouts_are_refused(options):
    with pytest.raises(UserError, match="is for timm ViTs with a class token"):
        vit(**options)
