"""MoCo v3 against the official code, in float64 (the table of positions in float32, as there)."""

import pytest
import torch

from conftest import Tiny, close, on_ranks
from sslzoo.blocks.vit import sincos_2d
from sslzoo.losses import over_pairs, unit
from sslzoo.method import Batch
from sslzoo.methods.moco_v3 import MoCoV3
from sslzoo.optim import Optim


def test_contrastive_loss(oracle):
    o = oracle("mocov3_contrastive_loss")
    method = MoCoV3(Tiny(), dim=16, hidden=8, temperature=float(o["temperature"]))
    q1, q2 = o["q1"].requires_grad_(), o["q2"].requires_grad_()
    q, k = [unit(q1), unit(q2)], [unit(o["k1"]), unit(o["k2"])]
    close(method.contrast(q[0], k[1]).detach(), o["loss_q1_k2"])
    close(method.contrast(q[1], k[0]).detach(), o["loss_q2_k1"])
    loss = 2 * over_pairs(method.contrast, q, k)
    loss.backward()
    close(loss.detach(), o["loss"])
    close(q1.grad, o["grad_q1"])
    close(q2.grad, o["grad_q2"])


def contrast_on_rank(rank, o):
    method = MoCoV3(Tiny(), dim=12, hidden=8, temperature=float(o["temperature"]))
    q = o["all_q"].chunk(2)[rank].clone().requires_grad_()
    loss = method.contrast(unit(q), unit(o["all_k"].chunk(2)[rank]))
    loss.backward()
    return loss.detach(), q.grad


def test_contrastive_loss_on_two_ranks(oracle):
    o = oracle("mocov3_ddp2_contrastive_loss")
    for rank, (loss, grad) in enumerate(on_ranks(2, contrast_on_rank, o)):
        close(loss, o[f"rank{rank}_loss"])
        close(grad, o[f"rank{rank}_grad_q"])


@pytest.mark.parametrize(("head", "called"), [("resnet", "fc"), ("vit", "head")])
def test_full_steps_with_lars(oracle, head, called):
    o = oracle(f"mocov3_full_step_{head}")
    names = {
        "encoder.0": "base_encoder.l1",
        "projector": f"base_encoder.{called}",
        "predictor": "predictor",
        "target.copies.0.0": "momentum_encoder.l1",
        "target.copies.1": f"momentum_encoder.{called}",
    }

    def official(name: str) -> str:
        return next(name.replace(mine, theirs, 1) for mine, theirs in names.items() if name.startswith(mine + "."))

    dim, inputs = o["init/base_encoder.l1.weight"].shape
    hidden, width = o["init/predictor.0.weight"].shape
    optim = Optim(
        name="lars", lr=float(o["lr"]), lr_per=None, momentum=float(o["lars_momentum"]), exclude="bias_and_norm",
        weight_decay=float(o["weight_decay"]), lars="popular",
    )  # fmt: skip
    method = MoCoV3(
        Tiny(inputs, dim, norm=False), optim, dim=width, hidden=hidden, head=head, temperature=float(o["temperature"])
    ).double()
    method.load_state_dict({name: o[f"init/{official(name)}"] for name in method.state_dict()})
    optimizer = optim.build(method.parameter_groups())
    # The official code moves the key encoder at the start of a step, ours at the end of the one before. That is the
    # same from equal weights; the oracle starts from different ones, so its first move is made here.
    method.target.update(method.encoder, method.projector, momentum=float(o["step0_ema"]))
    for step in range(2):
        optimizer.zero_grad()
        x1, x2 = o[f"step{step}_x1"], o[f"step{step}_x2"]
        loss = method.loss(Batch([x1, x2], torch.arange(len(x1)), torch.full((len(x1),), -1)))
        loss.backward()
        close(loss.detach(), o[f"step{step}_loss"])
        grads = {official(name): p.grad for name, p in method.named_parameters() if p.grad is not None}
        expected = o(f"step{step}_grad")
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            close(grads[name], grad)
        optimizer.step()
        expected = o(f"step{step}_after")
        for name, value in method.state_dict().items():
            close(value, expected[official(name)])
        if step == 0:
            # The oracle's momenta follow no schedule: run so long that the cosine's first step reaches its second.
            method.momentum, method.step, method.steps = float(o["step1_ema"]), 0, 10**12
            method.after_step()


def test_positions(oracle):
    o = oracle("sincos2d_mocov3")
    for name, table in o.items():
        height, width, dim = (int(part[1:]) for part in name.removeprefix("pos_embed_").split("_"))
        torch.testing.assert_close(sincos_2d(height, width, dim), table, rtol=0, atol=1e-6)
