"""The second stage of a C4 detector is the encoder's own last stage."""

import torch
from torch import nn

from detecting import ENCODERS, MEAN, SMALL, STD
from sslzoo.downstream.detectors import build


@torch.no_grad()
def test_a_c4_detector_sees_the_third_map_and_its_head_goes_on_to_the_fourth():
    encoder = ENCODERS["resnet"]().eval()
    net = build("faster_rcnn_c4", encoder, 2, MEAN, STD, min_size=64, **SMALL).eval()
    x = torch.rand(2, 3, 64, 64)
    *_, c4, c5 = encoder.maps(x)
    assert torch.equal(net.backbone(x)["0"], c4)
    stage, extra = net.roi_heads.box_head
    assert torch.equal(stage(c4), c5)
    assert isinstance(extra, nn.BatchNorm2d)
    assert stage is encoder.net.layer4
