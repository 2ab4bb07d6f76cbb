"""Heads: the layouts and parameter counts of the papers."""

import pytest
import torch
from torch import nn

from conftest import close
from sslzoo.blocks.heads import MLP


def layout(head: nn.Module) -> list[str]:
    """One word a layer: widths and bias of linear layers, which parameters a norm has."""
    words = []
    for layer in head:
        match layer:
            case nn.Linear():
                words.append(f"{layer.in_features}-{layer.out_features}{'+b' if layer.bias is not None else ''}")
            case nn.BatchNorm1d(affine=False):
                words.append("batch")
            case nn.BatchNorm1d():
                words.append("batch*" + ("+" if layer.bias.requires_grad else ""))
            case _:
                words.append(type(layer).__name__.lower())
    return words


@pytest.mark.parametrize(
    ("dims", "options", "expected"),
    [
        ((8, 3), {}, ["8-3+b"]),
        ((8, 6, 3), {}, ["8-6+b", "relu", "6-3+b"]),
        ((8, 6, 3), {"norm": "batch"}, ["8-6", "batch*+", "relu", "6-3+b"]),
        ((8, 6, 3), {"norm": "layer"}, ["8-6", "layernorm", "relu", "6-3+b"]),
        ((8, 6, 3), {"norm": "batch", "bias": True, "last_bias": False}, ["8-6+b", "batch*+", "relu", "6-3"]),
        ((8, 6, 3), {"bias": False}, ["8-6", "relu", "6-3+b"]),
        ((8, 3), {"last_norm": "batch"}, ["8-3", "batch*+"]),
        ((8, 3), {"last_norm": "layer"}, ["8-3", "layernorm"]),
        ((8, 3), {"last_norm": "batch_no_affine"}, ["8-3", "batch"]),
        ((8, 3), {"last_norm": "batch_no_beta"}, ["8-3", "batch*"]),
        ((8, 3), {"last_norm": "batch_no_affine", "last_bias": True}, ["8-3+b", "batch"]),
        (
            (8, 6, 5, 3),
            {"norm": "batch", "last_norm": "batch_no_affine"},
            ["8-6", "batch*+", "relu", "6-5", "batch*+", "relu", "5-3", "batch"],
        ),
    ],
)
def test_layers_norms_and_biases_are_those_asked_for(dims, options, expected):
    assert layout(MLP(*dims, **options)) == expected


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("InstDisc", lambda: MLP(2048, 128), 262_272),
        ("MoCo v2", lambda: MLP(2048, 2048, 128), 4_458_624),
        ("MoCo v3 projector", lambda: MLP(2048, 4096, 256, norm="batch", last_norm="batch_no_affine"), 9_445_376),
        ("MoCo v3 predictor", lambda: MLP(256, 4096, 256, norm="batch", last_bias=False), 2_105_344),
        (
            "MoCo v3 ViT-B projector",
            lambda: MLP(768, 4096, 4096, 256, norm="batch", last_norm="batch_no_affine"),
            768 * 4096 + 4096 * 4096 + 4096 * 256 + 4 * 4096,
        ),
        ("SimCLR", lambda: MLP(2048, 2048, 128, norm="batch", last_norm="batch_no_beta"), 4_460_672),
        ("SimCLR v2", lambda: MLP(2048, 2048, 2048, 128, norm="batch", last_norm="batch_no_beta"), 8_659_072),
        ("BYOL projector", lambda: MLP(2048, 4096, 256, norm="batch", bias=True, last_bias=False), 9_449_472),
        ("BYOL predictor", lambda: MLP(256, 4096, 256, norm="batch", bias=True, last_bias=False), 2_109_440),
        (
            "SimSiam projector",  # as the paper prints it, without the third layer's frozen bias
            lambda: MLP(2048, 2048, 2048, 2048, norm="batch", last_norm="batch_no_affine"),
            12_591_104,
        ),
        ("SimSiam predictor", lambda: MLP(2048, 512, 2048, norm="batch"), 2_100_224),
        (
            "Barlow Twins",
            lambda: MLP(2048, 8192, 8192, 8192, norm="batch", last_norm="batch_no_affine"),
            151_027_712,
        ),
    ],
)
def test_heads_of_the_papers_have_their_number_of_parameters(name, head, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in head().parameters() if p.requires_grad) == expected


def test_mlp_is_its_layers_by_hand():
    head = MLP(8, 6, 3, norm="batch", last_norm="batch_no_beta").double()
    first, _, _, last, scale = head
    with torch.no_grad():
        scale.weight.uniform_(0.5, 2)
    x = torch.randn(10, 8, dtype=torch.double)

    def batchnorm(h):
        return (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()

    h = batchnorm(x @ first.weight.T).clamp(min=0)
    close(head(x), batchnorm(h @ last.weight.T) * scale.weight)


def test_a_scale_without_a_shift_keeps_its_shift_at_zero_in_training():
    head = MLP(8, 3, last_norm="batch_no_beta")
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    (head(torch.randn(10, 8)) + 1).square().sum().backward()
    optimizer.step()
    assert not head[-1].bias.any()
    assert (head[-1].weight != 1).all()
