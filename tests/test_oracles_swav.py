"""SwAV's official numbers, reproduced in float64."""

import pytest
import torch
from torch import nn

from conftest import close, on_ranks
from sslzoo.losses import swapped_cross_entropy, unit
from sslzoo.method import Batch
from sslzoo.methods.swav import SwAV, sinkhorn
from sslzoo.optim import Optim


@pytest.mark.parametrize("case", [0, 1, 2])
def test_sinkhorn(oracle, case):
    o = oracle("swav_sinkhorn")
    codes = sinkhorn(o[f"case{case}_scores"], float(o[f"case{case}_epsilon"]), int(o[f"case{case}_iterations"]))
    close(codes, o[f"case{case}_assignment"])


def sinkhorn_rank(rank, o):
    return sinkhorn(o["all_scores"].chunk(2)[rank], float(o["epsilon"]), int(o["sinkhorn_iterations"]))


def test_sinkhorn_on_two_ranks(oracle):
    o = oracle("swav_ddp2_sinkhorn")
    ranks = on_ranks(2, sinkhorn_rank, o)
    for rank, codes in enumerate(ranks):
        close(codes, o[f"rank{rank}_assignment"])
    close(torch.cat(ranks), sinkhorn(o["all_scores"], float(o["epsilon"]), int(o["sinkhorn_iterations"])))


def test_loss(oracle):
    o = oracle("swav_loss")
    leaf = o["prototype_scores"].requires_grad_()
    scores = leaf.unflatten(0, (int(o["nmb_crops"].sum()), -1))  # (V, B, K)
    codes = [sinkhorn(s, float(o["epsilon"]), int(o["sinkhorn_iterations"])) for s in scores[:2]]
    loss = swapped_cross_entropy(scores, torch.stack(codes), float(o["temperature"]))
    loss.backward()
    close(loss.detach(), o["loss"])
    close(leaf.grad, o["grad_prototype_scores"])


class Features(nn.Identity):
    """Stands for the encoder: the oracle's crops are features."""

    dim = 64


def test_five_steps_with_multicrop_queue_and_frozen_prototypes(oracle):
    o = oracle("swav_train_multicrop_queue")
    method = SwAV(
        Features(),
        hidden=32,
        dim=16,
        prototypes=20,
        temperature=float(o["temperature"]),
        epsilon=float(o["epsilon"]),
        iterations=int(o["sinkhorn_iterations"]),
        queue_size=16,
        queue_start=0,
        freeze_prototypes=int(o["freeze_prototypes_niters"]),
    ).double()
    method.steps = method.epochs = 5  # one step an epoch
    init = o("init")
    parts = {"projection_head": method.projector, "prototypes": method.prototypes}
    for name, part in parts.items():
        part.load_state_dict({key.removeprefix(name + "."): w for key, w in init.items() if key.startswith(name)})
    method.prototypes.normalise()
    for queue, start in zip(method.queues, o["queue_init"], strict=True):
        queue.keys = start
    optim = Optim(name="sgd", lr_per=None, momentum=float(o["sgd_momentum"]), weight_decay=float(o["weight_decay"]))
    optimizer = optim.build(method.parameter_groups())
    for step in range(5):
        method.step = step
        for group in optimizer.param_groups:
            group["lr"] = float(o["lr_schedule"][step])
        optimizer.zero_grad()
        views = list(o[f"step{step}_crops"])
        loss = method.loss(Batch(views, torch.arange(8), torch.full((8,), -1)))
        loss.backward()
        method.before_step()
        close(loss.detach(), o[f"step{step}_loss"])
        grads = o(f"step{step}_grad")
        assert ("prototypes.weight" in grads) == (method.prototypes.weight.grad is not None) == (step > 0)
        optimizer.step()
        method.after_step()
        after = o(f"step{step}_after")
        for name, part in parts.items():
            for key, parameter in part.named_parameters():
                if f"{name}.{key}" in grads:
                    close(parameter.grad, grads[f"{name}.{key}"])
            for key, value in part.state_dict().items():
                # The official code brings prototypes back to length one at the start of the next step.
                official = after[f"{name}.{key}"]
                close(value, unit(official) if name == "prototypes" else official)
        for queue, official in zip(method.queues, o[f"step{step}_queue_after"], strict=True):
            by_age = queue.keys.roll(-int(queue.pointer), 0).unflatten(0, (-1, 8))  # batches, oldest first
            close(by_age.flip(0).flatten(0, 1), official)


def test_codes_of_each_step_with_its_queue(oracle):
    """The scores that the official Sinkhorn saw and the codes it gave, the batch's rows last."""
    o = oracle("swav_train_multicrop_queue")
    for step in range(5):
        for crop in range(2):
            scores = o[f"step{step}_sinkhorn_in_crop{crop}"]
            codes = sinkhorn(scores, float(o["epsilon"]), int(o["sinkhorn_iterations"]))[-8:]
            close(codes, o[f"step{step}_sinkhorn_out_crop{crop}"])
