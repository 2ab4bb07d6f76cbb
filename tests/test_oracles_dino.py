"""DINO's official numbers, reproduced in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from conftest import DATA, Oracle, Tiny, close, on_ranks
from sslzoo.method import Batch
from sslzoo.methods.dino import DINO, DINOHead
from sslzoo.optim import Optim


def test_loss_and_center_over_six_epochs(oracle):
    o = oracle("dino_loss_center")
    method = DINO(
        Tiny(),
        hidden=8,
        bottleneck=4,
        out_dim=20,
        student_temperature=float(o["student_temp"]),
        teacher_temperature=float(o["teacher_temp"]),
        warmup_teacher_temperature=float(o["warmup_teacher_temp"]),
        warmup_teacher_epochs=int(o["warmup_teacher_temp_epochs"]),
        center_momentum=float(o["center_momentum"]),
    ).double()
    method.steps = method.epochs = 6
    method.center.copy_(o["center_init"])
    for epoch in range(6):
        method.step = epoch
        close(method.temperature, float(o["teacher_temp_schedule"][epoch]))
        student = o[f"epoch{epoch}_student_output"].requires_grad_()
        loss = method.distillation(student, o[f"epoch{epoch}_teacher_output"])
        loss.backward()
        close(method.center, o[f"epoch{epoch}_center_before"])
        method.after_step()
        close(loss.detach(), o[f"epoch{epoch}_loss"])
        close(student.grad, o[f"epoch{epoch}_grad_student_output"])
        close(method.center, o[f"epoch{epoch}_center_after"])


def center_rank(rank, o):
    method = DINO(
        Tiny(),
        hidden=8,
        bottleneck=4,
        out_dim=12,
        student_temperature=float(o["student_temp"]),
        teacher_temperature=float(o["teacher_temp"]),
        center_momentum=float(o["center_momentum"]),
    ).double()
    found = []
    for step in range(2):
        student = o["student_output_step_rank"][step, rank].clone().requires_grad_()
        loss = method.distillation(student, o["teacher_output_step_rank"][step, rank])
        loss.backward()
        method.after_step()
        found.append((loss.detach(), student.grad, method.center.clone()))
    return found


def test_center_on_two_ranks(oracle):
    o = oracle("dino_ddp2_center")
    for rank, steps in enumerate(on_ranks(2, center_rank, o)):
        for step, (loss, grad, center) in enumerate(steps):
            close(loss, o[f"rank{rank}_step{step}_loss"])
            close(grad, o[f"rank{rank}_step{step}_grad_student"])
            close(center, o[f"rank{rank}_step{step}_center_after"])


@pytest.mark.parametrize("name", ["norm_last", "free_g"])
def test_head(oracle, name):
    o = oracle(f"dino_head_{name}")
    head = DINOHead(
        12, hidden=16, bottleneck=10, out_dim=20, use_bn=False, norm_last_layer=name == "norm_last"
    ).double()
    head.load_state_dict(o("param"))
    x = o["x"].requires_grad_()
    y = head(x)
    y.backward(o["upstream"])
    close(y.detach(), o["y"])
    close(x.grad, o["grad_x"])
    grads = {key: p.grad for key, p in head.named_parameters() if p.grad is not None}
    assert grads.keys() == o("grad").keys()
    for key, grad in grads.items():
        close(grad, o("grad")[key])


class TanhNorm(nn.Module):
    """The oracle's backbone."""

    dim = 14

    def __init__(self):
        super().__init__()
        self.l, self.ln = nn.Linear(12, 14), nn.LayerNorm(14)

    def forward(self, x):
        return self.ln(torch.tanh(self.l(x)))


def test_three_epochs_of_two_steps():
    with np.load(DATA / "oracles" / "dino_full_epochs.npz") as file:  # some of its arrays hold names
        o = Oracle(
            {key: torch.as_tensor(file[key]) if file[key].dtype.kind != "U" else file[key] for key in file.files}
        )
    temperatures = o["teacher_temp_schedule"]
    optim = Optim(name="adamw", lr=1.0, lr_per=None, exclude="bias_and_norm")
    method = DINO(
        TanhNorm(),
        optim,
        hidden=16,
        bottleneck=10,
        out_dim=20,
        student_temperature=float(o["student_temp"]),
        warmup_teacher_temperature=float(temperatures[0]),
        teacher_temperature=float(temperatures[-1]),
        warmup_teacher_epochs=3,
        center_momentum=float(o["center_momentum"]),
        momentum=float(o["momentum_schedule"][0]),
        clip=float(o["clip_grad"]),
        freeze_last_layer=int(o["freeze_last_layer"]),
    ).double()
    method.steps, method.epochs = 6, 3
    init = o("init")
    parts = {"backbone": (method.encoder, method.target.copies[0]), "head": (method.projector, method.target.copies[1])}
    for name, modules in parts.items():
        for module in modules:
            module.load_state_dict({k.removeprefix(name + "."): v for k, v in init.items() if k.startswith(name)})
    optimizer = optim.build(method.parameter_groups())
    decayed = [sum(len(g["params"]) for g in optimizer.param_groups if g["decay"] is decay) for decay in (True, False)]
    assert decayed == [len(o["regularized"]), len(o["not_regularized"])]
    for step in range(6):
        method.step, (epoch, iteration) = step, divmod(step, 2)
        close(method.temperature, float(temperatures[epoch]))
        for group in optimizer.param_groups:
            group["lr"] = float(o["lr_schedule"][step])
            group["weight_decay"] = float(o["wd_schedule"][step]) if group["decay"] else 0.0
        optimizer.zero_grad()
        views = list(o[f"ep{epoch}_it{iteration}_crops"])
        loss = method.loss(Batch(views, torch.arange(8), torch.full((8,), -1)))
        loss.backward()
        method.before_step()
        assert (method.projector.last_layer.weight_v.grad is None) == (epoch == 0)
        optimizer.step()
        with torch.no_grad():
            method.after_step()
        close(loss.detach(), o["losses"][step], rtol=1e-8, atol=1e-8)
        if iteration == 1:
            close(method.center, o[f"ep{epoch}_end_center"], rtol=1e-8, atol=1e-8)
            for name, modules in parts.items():
                for role, module in zip(("student", "teacher"), modules, strict=True):
                    for key, value in module.state_dict().items():
                        close(value, o[f"ep{epoch}_end_{role}/{name}.{key}"], rtol=1e-8, atol=1e-8)
