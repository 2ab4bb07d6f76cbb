"""The official implementations' numbers, reproduced in float64. Sources and conventions are in each file's meta."""

import pytest
import torch
from torch.nn.functional import normalize

from conftest import Tiny, close, on_ranks
from sslzoo import dist
from sslzoo.losses import info_nce
from sslzoo.memory import Queue
from sslzoo.method import Batch
from sslzoo.methods import MoCo
from sslzoo.optim import LARS, Optim, cosine, stepwise, warmup_cosine


def batch(*views):
    return Batch(list(views), torch.arange(len(views[0])), torch.full((len(views[0]),), -1))


# MoCo v1/v2


def test_moco_queue_and_infonce(oracle):
    o = oracle("moco_queue_infonce")
    queue = Queue(int(o["K"]), 16).double()
    queue.keys, queue.pointer = o["queue_init"].T.contiguous(), o["ptr_init"][0]
    for step in range(3):
        q_raw = o[f"step{step}_q_raw"].requires_grad_()
        q, k = normalize(q_raw), normalize(o[f"step{step}_k_raw"])
        loss = info_nce(q, k, queue.keys, float(o["temperature"]))
        queue.push(k)  # before the backward pass: the loss keeps the keys it saw
        loss.backward()
        close(loss.detach(), o[f"step{step}_loss"])
        close(q_raw.grad, o[f"step{step}_grad_q_raw"])
        close(queue.keys.T, o[f"step{step}_queue_after"])
        assert queue.pointer == o[f"step{step}_ptr_after"][0]


def test_queue_whose_size_is_no_multiple_of_the_batch(oracle):
    o = oracle("cmc_repo_moco_queue")
    queue = Queue(24, 16).double()
    queue.keys = o["queue_init"]
    for step in range(4):
        q, k = o[f"step{step}_q"].requires_grad_(), o[f"step{step}_k"]
        loss = info_nce(q, k, queue.keys, float(o["temperature"]))
        loss.backward()
        queue.push(k)
        close(loss.detach(), o[f"step{step}_loss"])
        close(q.grad, o[f"step{step}_grad_q"])
        close(queue.keys, o[f"step{step}_queue_after"])
        assert queue.pointer == o[f"step{step}_ptr_after"]


NAMES = {"0": "l1", "1": "bn"}  # Tiny's layers as the official stand-in encoder calls them


def load_moco(method: MoCo, o, mlp: bool):
    """Fill query and key networks from the oracle's states."""
    for prefix, encoder, projector in (
        ("encoder_q_init", method.encoder, method.projector),
        ("encoder_k_init", *method.target.copies),
    ):
        state = o(prefix)
        encoder.load_state_dict({k: state[f"{NAMES[k.split('.')[0]]}.{k.split('.')[1]}"] for k in encoder.state_dict()})
        projector.load_state_dict({k: state[f"fc.{k}" if mlp else f"fc.{k[2:]}"] for k in projector.state_dict()})
    method.queue.keys = o["queue_init"].T.contiguous()


def test_moco_three_full_steps_with_sgd(oracle):
    o = oracle("moco_full_step")
    method = MoCo(
        Tiny(),
        dim=16,
        layers=2,
        queue_size=64,
        temperature=float(o["temperature"]),
        momentum=float(o["ema"]),
        bn_groups=1,
    ).double()
    load_moco(method, o, mlp=True)
    optim = Optim(
        lr=float(o["lr"]), lr_per=None, weight_decay=float(o["weight_decay"]), momentum=float(o["sgd_momentum"])
    )
    optimizer = optim.build(optim.groups(method.parameters()))
    # The official code moves the key encoder at the start of a step, ours at the end of the one before. That is the
    # same from equal weights; the oracle starts from different ones, so its first move is made here.
    method.target.update(method.encoder, method.projector, momentum=method.momentum)
    for step in range(3):
        if step:
            method.after_step()
        optimizer.zero_grad()
        loss = method.loss(batch(o[f"step{step}_im_q"], o[f"step{step}_im_k"]))
        loss.backward()
        optimizer.step()
        close(loss.detach(), o[f"step{step}_loss"])
        close(method.projector[2].weight.grad, o[f"step{step}_grad_fc_last_weight"])
        close(method.encoder[0].weight.grad, o[f"step{step}_grad_l1_weight"])
        for side, encoder, projector in (("q", method.encoder, method.projector), ("k", *method.target.copies)):
            state = o(f"step{step}_encoder_{side}_after")
            for key, value in encoder.state_dict().items():
                layer, name = key.split(".")
                close(value, state[f"{NAMES[layer]}.{name}"])
            for key, value in projector.state_dict().items():
                close(value, state[f"fc.{key}"])
    method.after_step()
    close(method.queue.keys.T, o["step2_queue_after"])
    assert method.queue.pointer == o["step2_ptr_after"][0]


def moco_rank(rank, o, order):
    method = MoCo(Tiny(), dim=8, layers=1, queue_size=16, temperature=float(o["temperature"]), bn_groups=2).double()
    load_moco(method, o, mlp=False)
    world = dist.world()
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    from sslzoo.methods import moco

    moco.permutation = lambda *_: order
    loss = method.loss(batch(o["all_im_q"][share], o["all_im_k"][share]))
    loss.backward()
    with torch.no_grad():
        method.after_step()
    q_mean, k_mean = method.encoder[1].running_mean, method.target.copies[0][1].running_mean
    return loss.item(), method.projector[0].weight.grad, method.queue.keys, int(method.queue.pointer), q_mean, k_mean


def test_moco_shuffle_bn_on_two_ranks(oracle):
    o = oracle("moco_ddp2_shuffle_bn")
    for rank, (loss, grad, keys, pointer, q_mean, k_mean) in enumerate(on_ranks(2, moco_rank, o, o["shuffle_idx"])):
        close(loss, float(o[f"rank{rank}_loss"]))
        close(grad, o[f"rank{rank}_grad_fc_weight"])
        close(keys.T, o[f"rank{rank}_queue_after"])
        assert pointer == o[f"rank{rank}_ptr_after"][0]
        close(q_mean, o[f"rank{rank}_q_bn_running_mean"])
        close(k_mean, o[f"rank{rank}_k_bn_running_mean"])


def test_moco_split_batch_on_one_device_does_what_shuffle_bn_does_on_two(oracle, monkeypatch):
    o = oracle("moco_ddp2_shuffle_bn")
    monkeypatch.setattr("sslzoo.methods.moco.permutation", lambda *_: o["shuffle_idx"])
    loss, grad, keys, *_ = moco_rank(0, o, o["shuffle_idx"])
    close(loss, (o["rank0_loss"] + o["rank1_loss"]).item() / 2)
    close(grad, (o["rank0_grad_fc_weight"] + o["rank1_grad_fc_weight"]) / 2)
    close(keys.T, o["rank0_queue_after"])


# Schedules


def test_schedule_moco(oracle):
    o = oracle("schedule_moco")
    base, total = float(o["base_lr"]), int(o["total_epochs"])
    for epoch, stepped, smooth in zip(o["epoch"], o["lr_step"], o["lr_cosine"], strict=True):
        close(stepwise(int(epoch), base, o["milestones"].tolist()), float(stepped))
        close(cosine(base, 0, int(epoch) / total), float(smooth))
        by_recipe = Optim(lr=base, batch_size=256, schedule="step", milestones=(0.6, 0.8), per_epoch=True)
        close(by_recipe.lr_at(int(epoch) * 7 + 3, total * 7, 7), float(stepped))
        by_recipe = Optim(lr=base, batch_size=256, per_epoch=True)
        close(by_recipe.lr_at(int(epoch) * 7 + 3, total * 7, 7), float(smooth))


def test_schedule_moco_v3(oracle):
    o = oracle("schedule_mocov3")
    total, base = int(o["total_epochs"]), float(o["base_momentum"])
    for epoch, lr, momentum in zip(o["epoch"].tolist(), o["lr"], o["momentum"], strict=True):
        close(warmup_cosine(epoch, total, int(o["warmup_epochs"]), float(o["base_lr_scaled"])), float(lr))
        close(cosine(base, 1, epoch / total), float(momentum))


def test_schedule_simclr(oracle):
    o = oracle("schedule_simclr")
    n, size, epochs = (int(o[key]) for key in ("num_examples", "train_batch_size", "train_epochs"))
    warmup = round(int(o["warmup_epochs"]) * n // size)
    for scaling, key in (("linear", "lr_linear"), ("sqrt", "lr_sqrt")):
        optim = Optim(lr=float(o[f"base_{key}"]), batch_size=size, lr_scaling=scaling)
        for step, lr in zip(o["step"].tolist(), o[key], strict=True):
            close(
                warmup_cosine(step, n * epochs // size + 1, warmup, optim.peak_lr), float(lr), rtol=1e-6, atol=5e-8
            )  # float32


def test_schedule_byol(oracle):
    o = oracle("schedule_byol")
    total, warmup = int(o["max_steps"]), int(o["warmup_steps"])
    peak = Optim(lr=float(o["base_learning_rate"]), batch_size=int(o["batch_size"])).peak_lr
    for step, tau, lr in zip(o["step"].tolist(), o["target_ema"], o["learning_rate"], strict=True):
        close(cosine(float(o["base_ema"]), 1, min(1, step / total)), float(tau))
        close(warmup_cosine(step, total, warmup, peak), float(lr), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["momentum", "lr", "weight_decay"])
def test_schedule_dino(oracle, name):
    o = oracle("schedule_dino")
    per_epoch = int(o[f"{name}_niter_per_ep"])
    warmup = per_epoch * int(o.get(f"{name}_warmup_epochs", 0))
    start, end = float(o[f"{name}_base_value"]), float(o[f"{name}_final_value"])
    for step, value in enumerate(o[name]):
        total = int(o[f"{name}_epochs"]) * per_epoch
        close(warmup_cosine(step, total, warmup, start, end, inclusive=True), float(value))


# LARS


def run_lars(o, groups_of, steps, **options):
    weights = {key: torch.nn.Parameter(value) for key, value in o("init").items()}
    optimizer = LARS(groups_of(weights), lr=1.0, **options)
    for step in range(steps):
        lr = float(o.get(f"step{step}_lr", o.get("lr")))
        for group in optimizer.param_groups:
            group["lr"] = lr
        grads = o(f"step{step}_grad")
        for key, weight in weights.items():
            weight.grad = grads.get(key)
        optimizer.step()
        for key, value in o(f"step{step}_after").items():
            close(weights[key].detach(), value)
        for slot in ("momentum_slot", "momentum_buffer"):
            for key, value in o(f"step{step}_{slot}").items():
                close(optimizer.state[weights[key]]["momentum_buffer"], value)


def everything(weights):
    return list(weights.values())


def simclr_groups(weights):
    spared = [key for key in weights if "batch_normalization" in key or "bias" in key or "head_supervised" in key]
    rest = [value for key, value in weights.items() if key not in spared]
    return [{"params": rest, "exclude": False}, {"params": [weights[key] for key in spared], "exclude": True}]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("classic", {"form": "classic"}),
        ("nesterov", {"form": "classic", "nesterov": True}),
        ("popular_momentum", {"form": "popular", "adapt_after_momentum": True}),
    ],
)
def test_lars_simclr(oracle, name, options):
    o = oracle(f"lars_simclr_{name}")
    options |= {"weight_decay": float(o["weight_decay"]), "trust_coefficient": float(o["eeta"])}
    run_lars(o, simclr_groups, 3, momentum=float(o["momentum"]), **options)


def test_lars_moco_v3(oracle):
    o = oracle("lars_mocov3")
    options = {key: float(o[key]) for key in ("weight_decay", "momentum", "trust_coefficient")}
    run_lars(o, everything, 3, **options)


def test_lars_byol(oracle):
    o = oracle("lars_byol")
    options = {"weight_decay": float(o["weight_decay"]), "trust_coefficient": float(o["eta"])}
    run_lars(o, everything, 3, momentum=float(o["momentum"]), **options)


def test_lars_dino(oracle):
    o = oracle("lars_dino")
    options = {"weight_decay": float(o["weight_decay"]), "trust_coefficient": float(o["eta"])}
    run_lars(o, everything, 2, momentum=float(o["momentum"]), **options)


@pytest.mark.parametrize("clip", [False, True])
def test_larc_apex(oracle, clip):
    o = oracle(f"larc_apex_{'clip' if clip else 'scale'}")
    options = {key: float(o[key]) for key in ("weight_decay", "momentum", "trust_coefficient", "eps")}
    run_lars(o, everything, 3, form="larc", clip=clip, **options)


def test_lars_barlow_with_its_two_rates(oracle):
    o = oracle("lars_barlow_with_schedule")
    weights = {key: torch.nn.Parameter(value) for key, value in o("init").items()}
    small, large = [w for w in weights.values() if w.ndim == 1], [w for w in weights.values() if w.ndim > 1]
    groups = [{"params": large}, {"params": small}]
    options = {"weight_decay": float(o["weight_decay"]), "trust_coefficient": float(o["eta"])}
    optimizer = LARS(groups, lr=1.0, momentum=float(o["momentum"]), **options)
    per_epoch, total = int(o["iters_per_epoch"]), int(o["epochs"]) * int(o["iters_per_epoch"])
    for i, step in enumerate(o["global_steps"].tolist()):
        for group, key in zip(optimizer.param_groups, ("weights", "biases"), strict=True):
            peak = float(o[f"learning_rate_{key}"]) * int(o["batch_size"]) / 256
            group["lr"] = warmup_cosine(step, total, 10 * per_epoch, peak, peak * 1e-3)
            close(group["lr"], float(o[f"lr_{key}"][i]))
        for key, grad in o(f"step{i}_grad").items():
            weights[key].grad = grad
        optimizer.step()
        for key, value in o(f"step{i}_after").items():
            close(weights[key].detach(), value)
