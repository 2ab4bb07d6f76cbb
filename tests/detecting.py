"""What the tests of detectors share: small encoders of every kind, images, boxes, a training step."""

import torch
from torch import nn

from sslzoo.blocks import Encoder, LabEncoder, PatchEncoder

MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.25, 0.2]
MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.25, 0.2]
SMALL = {"channels": 32, "convs": 2, "norm": "group", "rois": 16, "proposals": 20}
MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.25, 0.2]
SMALL = {"channels": 32, "convs": 2, "norm": "group", "rois": 16, "proposals": 20}
ENCODERS = {
    "resnet": lambda: Encoder("resnet10t", width=0.25),
    "small stem": lambda: Encoder("resnet10t", stem="small", width=0.25),
    "convnext": lambda: Encoder("convnext_atto", options={"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}),
    "swin": lambda: Encoder(
        "swin_tiny_patch4_window7_224",
        options={"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
    ),
    "vit": lambda: Encoder(
        "vit_tiny_patch16_224", options={"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 2}
    ),
    "lab": lambda: LabEncoder("resnet10t", stem="small", width=0.25),
    "patches": lambda: PatchEncoder("resnet10t", width=0.25, patch=32, stride=16),
}


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.rand(3, *size) for size in sizes]


def targets(*boxes: list[list[float]], size: int = 64) -> list[dict]:
    """Boxes of the classes 1, 2, ...; masks that fill them."""
    found = []
    for each in boxes:
        corners = torch.tensor(each, dtype=torch.float).view(-1, 4)
        masks = torch.zeros(len(corners), size, size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, corners.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        found.append({"boxes": corners, "labels": torch.arange(1, len(corners) + 1), "masks": masks})
    return found


BOXES = [[4.0, 4, 30, 40], [20, 10, 60, 50]], []


def step(net: nn.Module, wanted: list[dict]) -> dict:
    """Losses and gradients of one training step."""
    losses = net.train()(images(*[(64, 64)] * len(wanted)), wanted)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}
