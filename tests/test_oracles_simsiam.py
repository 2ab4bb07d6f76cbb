"""SimSiam against the official code, in float64."""

import pytest
import torch

from conftest import Tiny, close
from sslzoo.losses import over_pairs
from sslzoo.method import Batch
from sslzoo.methods.simsiam import SimSiam, negative_cosine
from sslzoo.optim import Optim


def test_loss(oracle):
    o = oracle("simsiam_loss")
    p = [o["p1"].requires_grad_(), o["p2"].requires_grad_()]
    loss = over_pairs(negative_cosine, p, [o["z1"], o["z2"]])
    loss.backward()
    close(loss.detach(), o["loss"])
    close(p[0].grad, o["grad_p1"])
    close(p[1].grad, o["grad_p2"])


def ours(name: str) -> str:
    """The official parameter's name here; the encoder is a linear layer and a ReLU."""
    return name.replace("encoder.l1", "encoder.0").replace("encoder.fc", "projector")


def test_full_steps_with_sgd_and_a_constant_rate_of_the_predictor(oracle):
    o = oracle("simsiam_full_step")
    dim, inputs = o["init/encoder.l1.weight"].shape
    encoder = Tiny(inputs, dim, norm=False)
    optim = Optim(
        lr=float(o["init_lr"]), lr_per=None, momentum=float(o["sgd_momentum"]), per_epoch=True,
        weight_decay=float(o["weight_decay"]),
    )  # fmt: skip
    width, bottleneck = o["init/encoder.fc.6.weight"].shape[0], o["init/predictor.0.weight"].shape[0]
    method = SimSiam(encoder, optim, dim=width, bottleneck=bottleneck).double()
    method.load_state_dict({ours(name): value for name, value in o("init").items()})
    assert not method.projector[6].bias.requires_grad
    optimizer = optim.build(method.parameter_groups())
    per_epoch = 7
    for i in range(3):
        step = int(o[f"step{i}_epoch"]) * per_epoch + 3  # the rate moves once an epoch
        optim.set(optimizer, step, int(o["total_epochs"]) * per_epoch, per_epoch)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[id(method.encoder[0].weight)] == pytest.approx(float(o[f"step{i}_lr_encoder"]), rel=1e-12)
        assert rates[id(method.predictor[0].weight)] == pytest.approx(float(o[f"step{i}_lr_predictor"]), rel=1e-12)
        optimizer.zero_grad()
        x1, x2 = o[f"step{i}_x1"], o[f"step{i}_x2"]
        loss = method.loss(Batch([x1, x2], torch.arange(len(x1)), torch.full((len(x1),), -1)))
        loss.backward()
        close(loss.detach(), o[f"step{i}_loss"])
        grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        expected = {ours(name): grad for name, grad in o(f"step{i}_grad").items()}
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            close(grads[name], grad)
        optimizer.step()
        state = method.state_dict()
        for name, value in o(f"step{i}_after").items():
            close(state[ours(name)], value)
