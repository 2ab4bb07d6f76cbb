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


CONV = {"stem": "conv", "options": OPTIONS | {"depth": 5}}


def test_a_convolutional_stem_halves_the_image_to_its_patches_and_takes_a_block():
    plain, encoder = Encoder("vit_tiny_patch16_224", options=CONV["options"]), Encoder("vit_tiny_patch16_224", **CONV)
    stem = encoder.net.patch_embed.proj
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in stem if hasattr(c, "stride")]
    assert shapes == [(3, 8, 3, 2), (8, 16, 3, 2), (16, 32, 3, 2), (32, 32, 1, 1)]
    x = torch.randn(2, 3, 32, 32)
    assert stem(x).shape == plain.net.patch_embed.proj(x).shape == (2, 32, 4, 4)
    assert encoder(x).shape == (2, encoder.dim) == (2, 32)
    assert [len(each.net.blocks) for each in (plain, encoder)] == [5, 4]
    assert [m.shape for m in encoder.maps(x)] == [(2, 32, 4, 4)] * 4
    assert (encoder.widths, encoder.strides) == (plain.widths, plain.strides)


def test_a_vit_s_with_a_convolutional_stem_is_about_as_large_as_without():
    """MoCo v3 and Xiao et al. take one block for it."""
    plain, conv = (Encoder("vit_small_patch16_224", stem) for stem in ("imagenet", "conv"))
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in (plain, conv)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_config_of_a_convolutional_stem_builds_it_again():
    encoder = Encoder("vit_tiny_patch16_224", **CONV).eval()
    again = Encoder(**encoder.config).eval()
    again.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), encoder(x))


def test_patches_of_a_convolutional_stem_are_not_to_be_frozen():
    encoder = Encoder("vit_tiny_patch16_224", **CONV)
    before = encoder.net.blocks[0].mlp.fc1.weight.clone()
    with pytest.raises(UserError, match=r"encoder\.stem=conv has none; set method\.frozen_patches=false"):
        prepare_vit(encoder.net)
    assert torch.equal(encoder.net.blocks[0].mlp.fc1.weight, before)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("resnet18", {}, "encoder.stem=conv is for timm ViTs"),
        ("vit_tiny_patch16_224", {"options": OPTIONS | {"img_size": 36, "patch_size": 6}}, "with patches of 6 is none"),
        ("vit_tiny_patch16_224", {"options": OPTIONS | {"depth": 1}}, "two blocks or more"),
        ("vit_tiny_patch16_224", {"width": 0.5}, "leave encoder.width"),
        ("vit_tiny_patch16_224", {"pretrained": True}, "pretrained=false"),
    ],
)
def test_where_a_convolutional_stem_does_not_fit_it_is_refused(name, settings, told):
    with pytest.raises(UserError, match=told):
        Encoder(name, "conv", **settings)
