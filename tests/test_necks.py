"""Pyramids lie at the strides they claim, and an encoder of one size takes others."""

import math

import pytest
import torch
from torch import nn

from detecting import ENCODERS
from sslzoo.blocks import PatchEncoder
from sslzoo.downstream.necks import Pyramid, group_norm, of_any_size
from sslzoo.errors import UserError


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]()


def test_an_encoder_of_one_size_takes_others_with_the_same_weights():
    encoder = ENCODERS["vit"]()
    free = of_any_size(encoder)
    x = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(free.maps(x), encoder.maps(x), strict=True))
    assert free.maps(torch.rand(1, 3, 96, 128))[-1].shape == (1, 48, 6, 8)
    with pytest.raises(AssertionError):
        encoder.maps(torch.rand(1, 3, 96, 128))


@torch.no_grad()
@pytest.mark.parametrize("model", ["retinanet", "faster_rcnn_fpn"])
def test_maps_lie_where_the_anchors_think(encoder, model):
    body = Pyramid(of_any_size(encoder), model, size=96, channels=32, norm="group")
    side = 4 * body.divisible
    maps = list(body(torch.rand(2, 3, side, side)).values())
    assert [tuple(level.shape) for level in maps] == [
        (2, 32, math.ceil(side / stride), math.ceil(side / stride)) for stride in body.strides
    ]


def test_maps_too_fine_for_a_pyramid_are_refused():
    encoder = PatchEncoder("resnet10t", stem="small", width=0.25, patch=16, stride=8, stages=2)
    with pytest.raises(UserError, match=r"maps at strides \[1, 2\], of which no pyramid from 4 upwards"):
        Pyramid(encoder, "retinanet", size=96, channels=32, norm="group")


def test_group_norm_of_bfloat16_loses_no_more_than_the_last_digits():
    norm, x = group_norm(64), 5 + torch.randn(2, 64, 6, 6)
    nn.init.normal_(norm.weight)
    y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    groups = x.bfloat16().double().view(2, 8, -1)
    wanted = (groups - groups.mean(2, keepdim=True)) / groups.std(2, correction=0, keepdim=True)
    wanted = wanted.view(2, 64, 6, 6) * norm.weight.detach().double().view(64, 1, 1)
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-4)
