"""Segmenters: heads as published, on the encoder's own weights, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sslzoo.blocks import Encoder, LabEncoder, PatchEncoder
from sslzoo.downstream.segmenters import MODELS, BilinearUp, build, dilated
from sslzoo.errors import UserError

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
VIT = {"img_size": 64, "depth": 4, "embed_dim": 24, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
NEXT = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
ENCODERS = {
    "resnet": lambda: Encoder("resnet10t", width=0.125),
    "small stem": lambda: Encoder("resnet10t", stem="small", width=0.125),
    "convnext": lambda: Encoder("convnext_atto", options=NEXT),
    "swin": lambda: Encoder("swin_tiny_patch4_window7_224", options=SWIN),
    "vit": lambda: Encoder("vit_tiny_patch16_224", options=VIT),
    "lab": lambda: LabEncoder("resnet10t", stem="small", width=0.25),
    "patches": lambda: PatchEncoder("resnet10t", width=0.125, patch=32, stride=16),
}
CANNOT = {("swin", "fcn_moco"), ("swin", "deeplabv3"), ("vit", "fcn_moco"), ("patches", "fcn_moco")}
FITS = [(encoder, model) for encoder in ENCODERS for model in MODELS if (encoder, model) not in CANNOT]


def segmenter(encoder: Encoder, model: str, classes: int = 3, **options):
    return build(model, encoder, classes, MEAN, STD, **{"channels": 8, "repeats": 1, **options})


@pytest.mark.parametrize(("encoder", "model"), FITS)
def test_scores_of_every_pixel_of_any_size_on_any_encoder(encoder, model):
    net = segmenter(ENCODERS[encoder](), model)
    scores = net(torch.rand(2, 3, 65, 96))
    assert scores.shape == (2, 3, 65, 96)
    assert scores.dtype == torch.float32
    scores.square().mean().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert all(".norm." in name and name.startswith("encoder") for name in without)  # after the last map


@pytest.mark.parametrize(("encoder", "model"), sorted(CANNOT))
def test_an_encoder_that_cannot_be_dilated_is_refused_in_one_line(encoder, model):
    with pytest.raises(UserError, match=rf"task.model={model} dilates the last stage.*set task.model=fcn or fpn") as e:
        segmenter(ENCODERS[encoder](), model)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["resnet10t", "resnet18", "resnet26", "convnext_atto"])
def test_a_dilated_stage_has_twice_the_resolution_and_the_same_maps_at_every_other_pixel(name):
    narrow = {"options": NEXT} if "next" in name else {"width": 0.125}
    encoder = Encoder(name, **narrow).double().eval()
    for p in encoder.parameters():  # layers that begin at zero would hide what is behind them
        p.data += 0.1 * torch.randn_like(p)
    encoder.metadata = {"method": "moco"}
    new = dilated(encoder, "fcn_moco").eval()
    assert new.strides == [4, 8, 16, 16]
    assert new.metadata == encoder.metadata
    assert {name: value.shape for name, value in new.state_dict().items()} == {
        name: value.shape for name, value in encoder.state_dict().items()
    }
    x = torch.randn(2, 3, 64, 96).double()
    for before, after in zip(encoder.maps(x)[:3], new.maps(x)[:3], strict=True):
        assert torch.equal(before, after)
    last = new.maps(x)[3]
    assert last.shape[2:] == (4, 6)
    torch.testing.assert_close(last[..., ::2, ::2], encoder.maps(x)[3], rtol=1e-9, atol=1e-9)


def test_dilation_keeps_the_very_weights_and_refuses_others(monkeypatch):
    encoder = Encoder("resnet10t", width=0.125)
    new = dilated(encoder, "fcn_moco")
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in encoder.state_dict().items())
    weights = encoder.state_dict()
    weights.pop("net.layer4.0.conv1.weight")
    monkeypatch.setattr(encoder, "state_dict", lambda: weights)
    with pytest.raises(RuntimeError, match=r"Missing key.*layer4.0.conv1"):
        dilated(encoder, "fcn_moco")


@pytest.mark.parametrize("model", ["fcn", "fpn", "nas_fpn"])
def test_other_models_train_the_encoder_itself(model):
    encoder = Encoder("resnet10t", width=0.125)
    assert segmenter(encoder, model).encoder is encoder


def test_images_are_normalised_and_padded_with_the_mean():
    net = segmenter(Encoder("resnet10t", width=0.125), "fcn").eval()
    x = torch.rand(1, 3, 40, 50)
    seen = []
    net.encoder.maps, maps = (lambda y: seen.append(y) or maps(y)), net.encoder.maps
    scores = net(x)
    assert seen[0].shape == (1, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(seen[0][..., :40, :50] * std + mean, x)
    assert seen[0][..., 40:, :].abs().max() == seen[0][..., 50:].abs().max() == 0
    padded = torch.cat([x, mean.expand(1, 3, 40, 14)], dim=3)
    padded = torch.cat([padded, mean.expand(1, 3, 24, 64)], dim=2)
    torch.testing.assert_close(net(padded)[..., :40, :50], scores)


@pytest.mark.parametrize("factor", [2, 3, 5, 7])
def test_a_transposed_convolution_begins_as_bilinear_interpolation_and_learns(factor):
    up = BilinearUp(3, factor).double()
    x = torch.randn(2, 3, 5, 4).double()
    wanted = F.interpolate(x, scale_factor=factor, mode="bilinear")
    torch.testing.assert_close(up(x), wanted, rtol=1e-6, atol=1e-6)
    assert all(p.requires_grad for p in up.parameters())


def test_an_fcn_begins_as_a_classifier_of_the_last_maps_pixels_interpolated():
    net = segmenter(Encoder("resnet10t", width=0.125), "fcn").eval()
    x = torch.rand(1, 3, 64, 96)
    last = net.encoder.maps((x - net.mean) / net.std)[-1]
    wanted = net.head[0](last)
    for _ in range(5):
        wanted = F.interpolate(wanted, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(net(x), wanted)
    assert sum(isinstance(layer, BilinearUp) for layer in net.head) == 5


def test_mocos_head_is_two_wide_convolutions_of_dilation_six():
    head = segmenter(Encoder("resnet10t", width=0.125), "fcn_moco").head
    convs = [layer for layer in head if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [256, 256, 3]
    assert [(conv.kernel_size, conv.dilation) for conv in convs] == [((3, 3), (6, 6))] * 2 + [((1, 1), (1, 1))]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in head) == 2


def test_deeplab_looks_at_stride_16_with_half_the_rates_of_stride_8():
    net = segmenter(Encoder("resnet10t", width=0.125), "deeplabv3")
    rates = [m.dilation[0] for m in net.head.modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1]
    assert rates == [6, 12, 18]
    assert net.encoder.strides[-1] == 16


def test_levels_of_a_pyramid_are_summed_at_the_finest():
    net = segmenter(Encoder("resnet10t", width=0.125), "fpn").eval()
    maps = net.encoder.maps(torch.rand(1, 3, 64, 64))
    levels = net.head.neck(maps)
    assert [level.shape[-1] for level in levels] == [16, 8, 4, 2]
    total = sum(F.interpolate(level, size=(16, 16), mode="bilinear") for level in levels)
    torch.testing.assert_close(net.head(maps), net.head.predict(total))


def test_nas_fpn_begins_at_stride_8_and_predicts_at_stride_4():
    net = segmenter(Encoder("resnet10t", width=0.125), "nas_fpn", repeats=3)
    maps = net.encoder.maps(torch.rand(2, 3, 64, 96))
    assert net.head(maps).shape == (2, 3, 16, 24)
    assert len(net.head.nas_fpn.laterals) == 3
    assert len(net.head.nas_fpn.cells) == 3


def test_half_precision_leaves_scores_in_float32():
    net = segmenter(Encoder("resnet10t", width=0.125), "fpn")
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.rand(2, 3, 64, 64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("unet", {}, "task.model=unet is none of fcn, fcn_moco, deeplabv3, fpn, nas_fpn"),
        ("fpn", {"norm": "layer"}, "task.norm=layer is none of none, group, batch"),
        ("fpn", {"channels": 0}, "task.channels=0 is too few"),
        ("nas_fpn", {"repeats": 0}, "task.repeats=0 is too few"),
        ("fcn", {"classes": 1}, "at least two classes to tell apart, these data have 1"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(model, options, message):
    with pytest.raises(UserError, match=message) as error:
        segmenter(ENCODERS["resnet"](), model, **options)
    assert "\n" not in str(error.value)


def test_maps_too_fine_for_nas_fpn_are_refused():
    encoder = PatchEncoder("resnet10t", stem="small", width=0.25, patch=16, stride=8, stages=2)
    with pytest.raises(UserError, match=r"strides 8, 16 and 32, and resnet10t has \[1, 2\]"):
        segmenter(encoder, "nas_fpn")
