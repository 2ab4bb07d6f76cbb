"""BYOL against the official JAX code, in float64 (its rate warms up in float32)."""

import torch
from torch import nn
from torch.nn import functional as F

from conftest import close
from sslzoo.blocks import MLP
from sslzoo.losses import over_pairs, unit
from sslzoo.method import Batch
from sslzoo.methods.byol import BYOL, distance
from sslzoo.optim import Optim


def test_loss(oracle):
    o = oracle("byol_loss")
    p = [o["prediction_view1"].requires_grad_(), o["prediction_view2"].requires_grad_()]
    z = [o["target_projection_view1"], o["target_projection_view2"]]
    loss = 2 * over_pairs(distance, [unit(x) for x in p], [unit(x) for x in z])
    loss.backward()
    close(loss.detach(), o["loss"])
    close(p[0].grad, o["grad_prediction_view1"])
    close(p[1].grad, o["grad_prediction_view2"])


class Flat(nn.Sequential):
    """The oracle's encoder: normalise (B, H, W, 3), flatten, one linear layer."""

    def __init__(self, before: int, dim: int):
        super().__init__(nn.Linear(before, dim))
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v, dtype=x.dtype) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        return super().forward(((x - mean) / std).flatten(1))


NAMES = {"tiny/lin": "encoder.0", "projector/linear": "projector.0", "projector/batch_norm": "projector.1",
         "projector/linear_1": "projector.3", "predictor/linear": "predictor.0", "predictor/batch_norm": "predictor.1",
         "predictor/linear_1": "predictor.3", "classifier": "classifier"}  # fmt: skip
KINDS = {"w": "weight", "b": "bias", "scale": "weight", "offset": "bias"}


def ours(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Haiku's parameters by our names and in torch's layout."""
    found = {}
    for name, value in weights.items():
        module, kind = name.rsplit("/", 1)
        found[f"{NAMES[module]}.{KINDS[kind]}"] = value.T if kind == "w" else value.flatten()
    return found


def parts(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}


def load(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    assert dict(module.named_parameters()).keys() == weights.keys()
    module.load_state_dict(weights, strict=False)  # running statistics begin alike


def test_four_full_steps_with_lars_and_the_trailing_target(oracle):
    o = oracle("byol_full_step")
    online, target = ours(o("online_init")), ours(o("target_init"))
    size, steps, warmup = (int(o[key]) for key in ("batch_size", "max_steps", "warmup_steps"))
    optim = Optim(
        name="lars", lars="popular", lr=float(o["base_learning_rate"]), batch_size=size, exclude="bias_and_norm",
        momentum=float(o["lars_momentum"]), weight_decay=float(o["weight_decay"]), warmup_epochs=warmup,
    )  # fmt: skip
    encoder = Flat(*reversed(online["encoder.0.weight"].shape))
    dim, hidden = online["projector.3.weight"].shape
    method = BYOL(encoder, optim, dim=dim, hidden=hidden, momentum=float(o["base_target_ema"]))
    # The oracle's two hidden widths differ, the paper's do not.
    method.predictor = MLP(
        dim, online["predictor.0.weight"].shape[0], dim, norm="batch", bias=True, last_bias=False
    )  # fmt: skip
    method.double()
    for name in ("encoder", "projector", "predictor"):
        load(getattr(method, name), parts(online, name))
    for copy, name in zip(method.target.copies, ("encoder", "projector"), strict=True):
        load(copy, parts(target, name))
    classifier = nn.Linear(*reversed(online["classifier.weight"].shape)).double()
    load(classifier, parts(online, "classifier"))

    optimizer = optim.build([*method.parameter_groups(), *optim.groups(classifier.parameters())])
    method.steps = steps
    tolerance = {"rtol": 1e-6, "atol": 1e-8}
    for step in range(4):
        method.step = step
        optim.set(optimizer, step, steps, 1)
        optimizer.zero_grad()
        x1, x2, labels = o[f"step{step}_view1"], o[f"step{step}_view2"], o[f"step{step}_labels"].long()
        loss = method.loss(Batch([x1, x2], torch.arange(size), labels))
        close(loss.detach(), o[f"step{step}_repr_loss"], **tolerance)
        # The released code trains a classifier beside, on features without a gradient.
        (loss + F.cross_entropy(classifier(method.encoder(x1).detach()), labels)).backward()
        optimizer.step()
        method.after_step()
        expected = ours(o(f"step{step}_online_after"))
        for name in ("encoder", "projector", "predictor"):
            for key, value in getattr(method, name).named_parameters():
                close(value.detach(), expected[f"{name}.{key}"], **tolerance)
        expected = ours(o(f"step{step}_target_after"))
        for copy, name in zip(method.target.copies, ("encoder", "projector"), strict=True):
            for key, value in copy.named_parameters():
                close(value, expected[f"{name}.{key}"], **tolerance)

    passes = 8  # two views in four steps
    for projector, side in ((method.projector, "online"), (method.target.copies[1], "target")):
        state = o(f"final_{side}_state/projector/batch_norm/~")
        close(projector[1].running_mean, state["mean_ema/hidden"].flatten(), **tolerance)
        # haiku averages the biased variance from 0 on, torch the unbiased one from 1 on
        variance = 0.9**passes + state["var_ema/hidden"].flatten() * size / (size - 1)
        close(projector[1].running_var, variance, **tolerance)
