"""What a method cannot work with is refused in one clear line: batches, memories, banks, images, ranks."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import on_ranks
from runs import Pull, archive, image_set, images, trainer
from sslzoo import dist
from sslzoo.__main__ import main
from sslzoo.config import composed, options
from sslzoo.errors import UserError
from sslzoo.losses import candidate_scores, first_of, nce, nce_log_z
from sslzoo.method import Batch
from sslzoo.methods.swav import sinkhorn
from sslzoo.tasks.pretrain import build_method

TINY = ["data=npz", "data.batch_size=16", "encoder.width=0.125", "image_size=16", "local_size=8"]
QUEUE = ["method.queue_size=32"]


def complaint(capsys, tmp_path, *arguments, root=None):
    root = root or archive(tmp_path / "noise.npz")
    here = [f"data.root={root}", f"run_dir={tmp_path / 'run'}", "trainer.accelerator=cpu"]
    assert main([*TINY, *here, *arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("sslzoo: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["method=moco", "data.batch_size=15", "method.bn_groups=4", *QUEUE],
            "bn_groups=4 does not split a batch of 15",
        ),
        (["method=moco", "method.queue_size=15"], "method.queue_size=15 does not hold the keys of a batch of 16"),
        (["method=simclr_v2", "method.queue_size=8"], "method.queue_size=8 does not hold the keys of a batch of 16"),
        (["method=swav", "method.queue_size=8"], "method.queue_size=8 does not hold the keys of a batch of 16"),
        (["method=moco", "method.queue_size=65"], "queue_size is 65 but npz has 64 training images; set"),
        (["method=instdisc", "method.size=63", "method.negatives=8"], "method.size=63 but npz has 64 training images"),
        (["method=cmc", "method.size=65", "method.negatives=8"], "method.size=65 but npz has 64 training images"),
        (["method=instdisc", "method.negatives=65"], "method.negatives=65 of method.size=64 images does not work"),
        (["method=cpc", "method.group=5"], "method.group=5 does not divide a batch of 16"),
        (["method=byol", "data.batch_size=65"], "data.batch_size=65 is larger than npz with its 64 training images"),
    ],
)
def test_a_batch_or_memory_that_does_not_fit_is_refused_before_anything_is_written(capsys, tmp_path, arguments, told):
    assert told in complaint(capsys, tmp_path, *arguments)
    assert not (tmp_path / "run").exists()


def gray_archive(path):
    gray = np.random.default_rng(0).integers(0, 255, (64, 16, 16), dtype=np.uint8)
    labels = np.arange(64) % 3
    np.savez(path, train_images=gray, train_labels=labels, val_images=gray, val_labels=labels)
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["method=cmc", "method.negatives=8"], "no image of the first batch has any colour; set encoder.colour=edges"),
        (
            ["method=cmc", "method.negatives=8", "encoder.colour=none", "encoder.channels=[3,1]"],
            "encoder.channels=[3, 1] needs images of 4 channels, these have 3",
        ),
        (
            ["method=cpc", "encoder.patch=8", "encoder.stride=5"],
            "patches of 8 pixels every 5 do not fill a grid of 3 x 3 or more on an image of 16; set image_size=18",
        ),
        (
            ["method=cpc", "encoder.patch=8", "encoder.stride=4", "method.offsets=[1,3]"],
            "method.offsets=[1, 3] reach beyond a grid of 3 x 3 patches; the largest is 2",
        ),
        (
            [
                "method=cpc",
                "encoder.patch=8",
                "encoder.stride=4",
                "method.offsets=[1]",
                "method.group=4",
                "views.full.size=16",
                "image_size=18",
            ],
            "patches of 8 pixels every 4 do not fill a grid of 3 x 3 or more on an image of 18",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_written(capsys, tmp_path, arguments, told):
    assert told in complaint(capsys, tmp_path, *arguments, root=gray_archive(tmp_path / "gray.npz"))
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_is_refused_before_anything_is_written_if_it_is_among_the_first(capsys, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(32):
        (root / f"{i}.png").write_bytes(b"no picture")
    line = complaint(capsys, tmp_path, "data=folder", "method=simsiam", root=root)
    assert "cannot be decoded" in line
    assert not (tmp_path / "run").exists()


# Accumulation

ACCUMULATE = {"cmc", "cpc", "cpc_v2", "dino", "instdisc", "moco", "moco_v2"}  # halves of a batch have nothing in common


def built(name, *overrides, scale="demo"):
    fits = [*QUEUE, "method.bn_groups=2"] if name.startswith("moco") and name != "moco_v3" else []
    fits += QUEUE if name == "swav" else []
    fits += ["method.negatives=8"] if name in ("cmc", "instdisc") else []
    fits += ["encoder=vit_tiny", "encoder.width=1"] if name == "dino" and scale == "vit" else []
    here = [*TINY, *fits, f"method={name}", "trainer.accumulate_grad_batches=2", *overrides]
    return build_method(composed(here), image_set(64, size=16))


@pytest.mark.parametrize("name", options("method"))
def test_accumulation_is_refused_where_it_would_train_another_method(name):
    """Where it is not, two accumulated halves equal one batch: see the test of that name of each method."""
    if name in ACCUMULATE:
        assert built(name, scale="vit").accumulates
    else:
        with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=2 would train another method"):
            built(name)


def test_accumulation_is_refused_for_dino_with_batchnorm_and_taken_for_byol_without():
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=2 would train another method"):
        built("dino")
    assert built("byol", "method.norm=group", "encoder.width=0.25").accumulates


# Extremes of half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_of_scores_at_the_ends_of_half_precision_are_finite(dtype):
    most = min(torch.finfo(dtype).max, 1e30)
    scores = torch.tensor([[most, -most, 0, torch.finfo(dtype).tiny], [-most] * 4, [most] * 4, [0] * 4]).to(dtype)
    codes = sinkhorn(scores, 1.0, 3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_nce_of_features_all_alike_or_all_opposite_is_finite_in_half_precision(dtype, sign):
    f = torch.nn.functional.normalize(torch.ones(4, 8), dim=1).to(dtype).requires_grad_()
    v = sign * f.detach()[:, None].expand(4, 9, 8)
    scores = candidate_scores(f, v, 0.02)
    log_z = nce_log_z(scores, torch.zeros(()), 10**6)
    losses = (nce(scores, log_z, 10**6), first_of(scores))
    (gradient,) = torch.autograd.grad(sum(losses), f)
    for value in (log_z, *losses, gradient):
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.07, 0.011, 0.005, 0.002])
def test_z_of_any_temperature_is_that_of_float64(dtype, temperature):
    """``exp(1 / 0.011)`` is beyond float32, and ``exp(-1 / 0.005)`` is 0 in it."""
    f = torch.nn.functional.normalize(torch.randn(6, 8), dim=1).to(dtype)
    near, far = f[:, None].expand(6, 9, 8), -f[:, None].expand(6, 9, 8)
    for candidates in (near, far, torch.cat([near, far], 1)):
        scores = candidate_scores(f, candidates, temperature)
        log_z = nce_log_z(scores, torch.zeros(()), 10**6)
        exact = scores.double().flatten().logsumexp(0) - np.log(scores.numel()) + np.log(1e6)
        assert log_z.item() == pytest.approx(exact.item(), rel=1e-6)
        assert nce_log_z(scores, torch.zeros((), dtype=dtype), 10**6).isfinite()
        assert nce(scores, log_z, 10**6).isfinite()


# Ranks


def own_loops_and_the_trainers(rank):
    """What each method says to a batch that is smaller on the second rank: its loss, and its training step."""
    told = {}
    for name in ("moco", "simclr", "byol"):
        method = built(name, "trainer.accumulate_grad_batches=1", "method.bn_groups=1" if name == "moco" else "seed=0")
        method.trainer = SimpleNamespace(global_step=0)
        share = 4 - rank
        batch = Batch([torch.rand(share, 3, 16, 16)] * 2, torch.arange(share), torch.full((share,), -1))
        for kind, take in (("loss", method.loss), ("step", lambda batch, m=method: m.training_step(batch, 0))):
            try:
                told[name, kind] = float(take(batch))
            except UserError as error:
                told[name, kind] = str(error)
    return told


def test_ranks_with_unlike_batches_are_all_told_instead_of_waiting_for_ever():
    begun = time.monotonic()
    ranks = on_ranks(2, own_loops_and_the_trainers)
    line = "ranks got batches of 4, 3 images, but need as many each; start all of them with the same data and data."
    for told in ranks:
        assert isinstance(told.pop(("byol", "loss")), float)  # gathers nothing, so has nothing to wait for
        assert len(told) == 5
        for said in told.values():
            assert said.startswith(line)
    assert time.monotonic() - begun < 120  # the group's patience is 180 s


def epochs_and_looks(rank):
    told, device, looked = [], torch.device("cpu"), []
    gather = dist._all_gather
    dist._all_gather = lambda x: looked.append(x.tolist()) or gather(x)
    for number in (8, 8, 4, 8, 4):
        dist.check_same(number, device)
    try:
        dist.check_same(10 + rank, device, "epochs of {} batches")
    except UserError as error:
        told.append(str(error))
    return told, looked


def test_a_number_is_compared_the_first_time_only_and_unlike_epochs_are_told():
    for rank, (told, looked) in enumerate(on_ranks(2, epochs_and_looks)):
        assert told == [
            "ranks got epochs of 10, 11 batches, but need as many each; start all of them with the same data and"
            " data.batch_size"
        ]
        assert looked == [[8], [4], [10 + rank]]


def test_the_trainer_compares_epochs_and_every_batch(monkeypatch):
    asked = []
    monkeypatch.setattr("sslzoo.method.check_same", lambda number, device, *what: asked.append((number, *what)))
    trainer(max_epochs=2).fit(Pull(), datamodule=images(batch_size=8))
    assert asked == [(3, "epochs of {} batches"), *[(8,)] * 6]
