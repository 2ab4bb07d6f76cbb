"""SimCLR v1 and v2 against the official TensorFlow code, in float64."""

import pytest
import torch
from torch import nn

from conftest import close, on_ranks
from sslzoo.blocks.sk import SKConv
from sslzoo.losses import nt_xent, unit
from sslzoo.methods.simclr import SimCLR


@pytest.mark.parametrize("case", [0, 1])
def test_nt_xent_is_half_of_the_official_loss(oracle, case):
    o = oracle("simclr_ntxent")
    hidden = o[f"case{case}_hidden"].requires_grad_()
    z = unit(hidden) if o[f"case{case}_hidden_norm"] else hidden
    loss = nt_xent(*z.chunk(2), float(o["temperature"]))
    loss.backward()
    close(2 * loss.detach(), o[f"case{case}_loss"])
    close(2 * hidden.grad, o[f"case{case}_grad_hidden"])


def nt_xent_on_rank(rank, o):
    hidden = o["hidden"][rank].clone().requires_grad_()
    loss = nt_xent(*unit(hidden).chunk(2), float(o["temperature"]))
    loss.backward()
    return loss.detach(), hidden.grad


def test_nt_xent_on_two_ranks_sends_gradients_to_both(oracle):
    o = oracle("simclr_ntxent_2replicas")
    for rank, (loss, grad) in enumerate(on_ranks(2, nt_xent_on_rank, o)):
        close(2 * loss, o["loss_per_replica"][rank])
        close(2 * grad, o["grad_hidden_per_replica"][rank])


@pytest.mark.parametrize("layers", [2, 3])
def test_projection_head(oracle, layers):
    o = oracle(f"simclr_projection_head_{layers}layers")
    encoder = nn.Identity()
    encoder.dim = o["x"].shape[1]
    method = SimCLR(encoder, dim=o["y"].shape[1], layers=layers).double()
    dense, norms = list(method.projector)[::3], list(method.projector)[1::3]
    with torch.no_grad():
        for i, (linear, bn) in enumerate(zip(dense, norms, strict=True)):
            linear.weight.copy_(o[f"layer{i}/kernel"].T)
            bn.weight.copy_(o[f"layer{i}/gamma"])
            bn.bias.copy_(o.get(f"layer{i}/beta", torch.zeros_like(bn.bias)))
    assert all(linear.bias is None for linear in dense)
    assert not norms[-1].bias.requires_grad

    x = o["x"].requires_grad_()
    y = method.projector(x)
    tolerance = {"rtol": 1e-7, "atol": 1e-8}
    close(y.detach(), o["y"], **tolerance)
    y.backward(o["upstream"])
    close(x.grad, o["grad_x"], **tolerance)
    rows = len(x)
    for i, (linear, bn) in enumerate(zip(dense, norms, strict=True)):
        close(linear.weight.grad, o[f"layer{i}/grad_kernel"].T, **tolerance)
        close(bn.weight.grad, o[f"layer{i}/grad_gamma"], **tolerance)
        if f"layer{i}/beta" in o:
            close(bn.bias.grad, o[f"layer{i}/grad_beta"], **tolerance)
        close(bn.running_mean, o[f"layer{i}/moving_mean_after_forward"], **tolerance)
        # TensorFlow averages the biased variance, torch the unbiased one; both began at 1.
        biased = (o[f"layer{i}/moving_variance_after_forward"] - 0.9) * rows / (rows - 1) + 0.9
        close(bn.running_var, biased, **tolerance)
        bn.running_var.copy_(o[f"layer{i}/moving_variance_after_forward"])
    method.eval()
    close(method.projector(x).detach(), o["y_eval_after_one_step"], **tolerance)


@pytest.mark.parametrize("layers", [2, 3])
def test_output_that_v2_fine_tunes_from(oracle, layers):
    o = oracle(f"simclr_projection_head_{layers}layers")
    encoder = nn.Identity()
    encoder.dim = o["x"].shape[1]
    method = SimCLR(encoder, dim=o["y"].shape[1], layers=layers).double()
    with torch.no_grad():
        method.projector[0].weight.copy_(o["layer0/kernel"].T)
        method.projector[1].weight.copy_(o["layer0/gamma"])
        method.projector[1].bias.copy_(o["layer0/beta"])
    close(method.up_to_layer(1)(o["x"]).detach(), o["finetune_input_selector1"], rtol=1e-7, atol=1e-8)
    close(method.up_to_layer(0)(o["x"]), o["x"])


@pytest.mark.parametrize("stride", [1, 2])
def test_selective_kernel_convolution(oracle, stride):
    o = oracle(f"simclrv2_sk_conv_stride{stride}")
    x = o["x_nhwc"].permute(0, 3, 1, 2).requires_grad_()
    sk = SKConv(x.shape[1], o["y_nhwc"].shape[3], stride).double()
    with torch.no_grad():
        for layer, name in ((sk.conv, "conv"), (sk.squeeze, "fc1"), (sk.mix, "fc2")):
            layer.weight.copy_(o[f"{name}/kernel"].permute(3, 2, 0, 1))
        for bn, name in ((sk.bn, "bn0"), (sk.squeeze_bn, "bn1")):
            bn.weight.copy_(o[f"{name}/gamma"])
            bn.bias.copy_(o[f"{name}/beta"])
    y = sk(x).permute(0, 2, 3, 1)
    close(y.detach(), o["y_nhwc"], rtol=1e-6, atol=1e-6)
    y.backward(torch.arange(y.numel(), dtype=torch.double).view(y.shape).cos())
    close(x.grad.permute(0, 2, 3, 1), o["grad_x_nhwc"], rtol=1e-6, atol=1e-6)
