"""Selective-kernel ResNets: sizes of the paper, pooling as in TensorFlow, use as an encoder."""

import pytest
import timm
import torch
from torch import nn

from sslzoo.blocks import sk
from sslzoo.blocks.encoder import Encoder
from sslzoo.errors import UserError

# SimCLR v2, table 1: millions of parameters with selective kernels, without the classifier
SIZES = [("sk_resnet50", 1, 35), ("sk_resnet50", 2, 140), ("sk_resnet101", 1, 65), ("sk_resnet152", 3, 795)]


@pytest.mark.parametrize(("name", "width", "millions"), SIZES)
def test_number_of_parameters_is_the_papers(name, width, millions):
    with torch.device("meta"):
        net = timm.create_model(name, width=width, num_classes=0)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)


def test_encoder_gives_features_and_maps():
    encoder = Encoder("sk_resnet50")
    x = torch.randn(2, 3, 64, 64)
    assert encoder.dim == 2048
    assert encoder(x).shape == (2, 2048)
    for stage, channels, stride in zip(encoder.maps(x), encoder.widths, encoder.strides, strict=True):
        assert stage.shape == (2, channels, 64 // stride, 64 // stride)


def test_encoder_of_double_width_is_built_again_from_its_config():
    encoder = Encoder("sk_resnet50", options={"width": 2})
    assert encoder.dim == 4096
    assert Encoder(**encoder.config).state_dict().keys() == encoder.state_dict().keys()


def test_small_stem_keeps_the_size():
    encoder = Encoder("sk_resnet50", stem="small")
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, 2048)
    assert encoder.strides == [1, 2, 4, 8]


def test_shortcut_of_the_first_stage_averages_what_the_image_has():
    net = timm.create_model("sk_resnet50")
    x = torch.randn(1, 4, 5, 5, dtype=torch.double)
    pooled = net.layer1[0].downsample[0](x)
    for i in range(5):
        for j in range(5):
            torch.testing.assert_close(pooled[..., i, j], x[..., i : i + 2, j : j + 2].mean((2, 3)))


def test_stem_pool_starts_at_the_border_as_tensorflow_does():
    x = torch.randn(1, 4, 8, 8)
    pooled = timm.create_model("sk_resnet50").maxpool(x)
    torch.testing.assert_close(pooled[..., 0, 0], x[..., :3, :3].amax((2, 3)))
    torch.testing.assert_close(pooled[..., 3, 3], x[..., 6:, 6:].amax((2, 3)))


def test_hidden_width_of_the_mixing():
    assert sk.SKConv(8, 64).squeeze.out_channels == 32
    assert sk.SKConv(8, 1024).squeeze.out_channels == 64
    assert isinstance(timm.create_model("sk_resnet50").layer2[0].bn2, nn.Identity)


def test_pretrained_weights_are_refused():
    with pytest.raises(UserError, match="no weights of sk_resnet"):
        timm.create_model("sk_resnet50", pretrained=True)
