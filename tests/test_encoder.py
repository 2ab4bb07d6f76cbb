"""Encoders: dims and maps that are true, stems and widths, configs that rebuild, refusals."""

import pytest
import torch

from sslzoo.blocks.encoder import Encoder
from sslzoo.errors import UserError

SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 5}
KINDS = {
    "resnet18": ({"name": "resnet18"}, 64),
    "resnet50": ({"name": "resnet50"}, 64),
    "resnet18, small stem": ({"name": "resnet18", "stem": "small"}, 32),
    "resnet18, narrow": ({"name": "resnet18", "width": 0.25}, 64),
    "resnet10t, narrow, small stem": ({"name": "resnet10t", "stem": "small", "width": 0.25}, 32),
    "resnet10t, three convolutions in its stem": ({"name": "resnet10t"}, 64),
    "resnet50, narrow, small stem": ({"name": "resnet50", "stem": "small", "width": 0.25}, 32),
    "resnet18, GroupNorm": ({"name": "resnet18", "width": 0.25, "norm": "group"}, 64),
    "vit_tiny": ({"name": "vit_tiny_patch16_224"}, 224),
    "vit_tiny at 32 pixels": ({"name": "vit_tiny_patch16_224", "options": SMALL_VIT}, 32),
    "convnext_atto": ({"name": "convnext_atto"}, 64),
}
MEANT = {  # dim, widths, strides
    "resnet18": (512, [64, 128, 256, 512], [4, 8, 16, 32]),
    "resnet50": (2048, [256, 512, 1024, 2048], [4, 8, 16, 32]),
    "resnet18, small stem": (512, [64, 128, 256, 512], [1, 2, 4, 8]),
    "resnet18, narrow": (128, [16, 32, 64, 128], [4, 8, 16, 32]),
    "resnet10t, narrow, small stem": (128, [16, 32, 64, 128], [1, 2, 4, 8]),
    "resnet10t, three convolutions in its stem": (512, [64, 128, 256, 512], [4, 8, 16, 32]),
    "resnet50, narrow, small stem": (512, [64, 128, 256, 512], [1, 2, 4, 8]),
    "resnet18, GroupNorm": (128, [16, 32, 64, 128], [4, 8, 16, 32]),
    "vit_tiny": (192, [192] * 4, [16] * 4),
    "vit_tiny at 32 pixels": (192, [192] * 4, [8] * 4),
    "convnext_atto": (320, [40, 80, 160, 320], [4, 8, 16, 32]),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    torch.manual_seed(0)
    options, size = KINDS[request.param]
    return request.param, Encoder(**options).eval(), torch.randn(2, 3, size, size)


@torch.no_grad()
def test_dim_widths_and_strides_are_those_of_what_comes_out(kind):
    name, encoder, x = kind
    assert (encoder.dim, encoder.widths, encoder.strides) == MEANT[name]
    assert encoder(x).shape == (2, encoder.dim)
    size = x.shape[-1]
    shapes = [tuple(found.shape) for found in encoder.maps(x)]
    expected = zip(encoder.widths, encoder.strides, strict=True)
    assert shapes == [(2, width, size // stride, size // stride) for width, stride in expected]


@torch.no_grad()
def test_features_of_a_resnet_are_its_last_map_averaged(kind):
    name, encoder, x = kind
    if "resnet" in name:
        torch.testing.assert_close(encoder(x), encoder.maps(x)[-1].mean((2, 3)), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_maps_of_a_vit_are_its_blocks_in_the_grid_of_its_patches():
    encoder = Encoder("vit_tiny_patch16_224", options=SMALL_VIT).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = encoder.maps(x)
    tokens = encoder.net.forward_features(x)  # normalised, the class token first
    torch.testing.assert_close(tokens[:, 0], encoder(x))
    torch.testing.assert_close(encoder.net.norm(maps[-1].flatten(2).transpose(1, 2)), tokens[:, 1:])
    assert not torch.allclose(maps[-2], maps[-1])


@torch.no_grad()
def test_the_config_builds_the_same_network_again(kind):
    _, encoder, x = kind
    twin = Encoder(**encoder.config).eval()
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(twin(x), encoder(x))
    assert (twin.dim, twin.widths, twin.strides) == (encoder.dim, encoder.widths, encoder.strides)


def test_small_stem_keeps_resolution_up_to_the_first_stage():
    small, large = Encoder("resnet18", stem="small").net, Encoder("resnet18").net
    x = torch.randn(1, 3, 32, 32)
    assert small.conv1(x).shape[-2:] == (32, 32)
    assert small.maxpool(small.conv1(x)).shape[-2:] == (32, 32)
    assert large.maxpool(large.conv1(x)).shape[-2:] == (8, 8)
    assert (small.conv1.kernel_size, small.conv1.bias) == ((3, 3), None)


def test_imagenet_stem_of_a_narrow_net_is_one_7x7_convolution_of_stride_2():
    conv = Encoder("resnet18", width=0.5).net.conv1
    assert (conv.out_channels, conv.kernel_size, conv.stride, conv.padding) == (32, (7, 7), (2, 2), (3, 3))


@pytest.mark.parametrize("options", [{"width": 0.5}, {"stem": "small"}, {"width": 2.0, "stem": "small"}])
def test_a_replaced_first_convolution_is_initialised_for_relu(options):
    conv = Encoder("resnet18", **options).net.conv1
    fan_out = conv.out_channels * conv.kernel_size[0] ** 2
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert abs(conv.weight.mean().item()) < 0.1 * conv.weight.std().item()


def test_width_scales_the_parameters_as_its_square():
    def count(width):
        with torch.device("meta"):
            return sum(p.numel() for p in Encoder("resnet18", width=width).parameters())

    assert count(2.0) / count(1.0) == pytest.approx(4, rel=0.02)
    assert count(0.25) / count(1.0) == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize("zero", [True, False])
def test_options_reach_timm(zero):
    encoder = Encoder("resnet18", stem="small", width=0.25, options={"zero_init_last": zero})
    lasts = [block.bn2.weight for stage in range(1, 5) for block in getattr(encoder.net, f"layer{stage}")]
    assert all((weight == (0 if zero else 1)).all() for weight in lasts)


def test_group_norm_gives_an_image_the_same_feature_whatever_its_batch():
    encoder = Encoder("resnet18", stem="small", width=0.25, norm="group").train()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), rtol=1e-4, atol=1e-5)
    plain = Encoder("resnet18", stem="small", width=0.25).train()
    assert not torch.allclose(plain(x)[:1], plain(x[:2])[:1], rtol=1e-2)


def test_weights_are_channels_last_and_values_do_not_depend_on_it():
    encoder = Encoder("resnet18", stem="small", width=0.25).eval()
    assert encoder.net.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16)
    plain = encoder(x)
    encoder.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(encoder(x), plain, rtol=1e-4, atol=1e-5)


def test_every_parameter_is_trained_by_the_feature():
    for options, size in (KINDS["resnet10t, narrow, small stem"], KINDS["vit_tiny at 32 pixels"]):
        encoder = Encoder(**options)
        encoder(torch.randn(2, 3, size, size)).square().sum().backward()
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == []  # else DDP waits for ever


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "resnet51"}, "encoder.name=resnet51 is no timm model; near names: resne"),
        ({"name": "qqqqq"}, "encoder.name=qqqqq is no timm model; timm.list_models"),
        ({"name": "resnet18", "stem": "big"}, "encoder.stem=big is none of imagenet, small"),
        ({"name": "resnet18", "norm": "layer"}, "encoder.norm=layer is none of batch, group"),
        ({"name": "vit_tiny_patch16_224", "stem": "small"}, "are for ResNets, vit_tiny_patch16_224 is none"),
        ({"name": "convnext_atto", "width": 2.0}, "encoder.width=2.0 are for ResNets"),
        ({"name": "resnet18", "stem": "small", "pretrained": True}, "fit encoder.stem=imagenet"),
        ({"name": "resnet18", "width": 0.5, "pretrained": True}, "encoder.width=1 only"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, told):
    with pytest.raises(UserError, match=told):
        Encoder(**options)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.03])
def test_a_width_that_leaves_no_channels_is_refused(width):
    with pytest.raises(UserError, match=f"encoder.width={width} leaves no channels"):
        Encoder("resnet18", width=width)
