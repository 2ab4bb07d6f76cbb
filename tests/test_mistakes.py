"""What a method cannot work with is refused in one clear line: batches, memories, banks, images, ranks."""

import numpy as np
import pytest
import torch

from runs import Pull, archive, image_set, images, trainer
from sslzoo import dist
from sslzoo.__main__ import main
from sslzoo.config import composed, options
from sslzoo.errors import UserError
from sslzoo.losses import candidate_scores, first_of, nce, nce_log_z
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


def test_gray_images_are_refused_by_cmc_before_the_first_step(capsys, tmp_path):
    gray = np.random.default_rng(0).integers(0, 255, (64, 16, 16), dtype=np.uint8)
    labels = np.arange(64) % 3
    np.savez(tmp_path / "gray.npz", train_images=gray, train_labels=labels, val_images=gray, val_labels=labels)
    line = complaint(capsys, tmp_path, "method=cmc", "method.negatives=8", root=tmp_path / "gray.npz")
    assert "no image of the first batch has any colour; set encoder.colour=edges" in line
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_patches_that_do_not_fit_the_image_are_refused_before_the_first_step(capsys, tmp_path):
    line = complaint(capsys, tmp_path, "method=cpc", "encoder.patch=8", "encoder.stride=5")
    assert (
        "patches of 8 pixels every 5 do not fill a grid of 3 x 3 or more on an image of 16; set image_size=18" in line
    )
    assert not (tmp_path / "run" / "last.ckpt").exists()


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


# Ranks


@pytest.mark.parametrize("rows", [4, 3])
def test_ranks_with_unlike_batches_are_all_told_instead_of_waiting_for_ever(monkeypatch, rows):
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", lambda x: torch.tensor([4, 3]))
    with pytest.raises(UserError, match="ranks got batches of 4, 3 images, but need as many each; start all of them"):
        dist.check_same_rows(rows, torch.device("cpu"))


def test_batches_are_compared_once_an_epoch(monkeypatch):
    asked = []
    monkeypatch.setattr("sslzoo.method.check_same_rows", lambda rows, device: asked.append(rows))
    trainer(max_epochs=3).fit(Pull(), datamodule=images(batch_size=8))
    assert asked == [8, 8, 8]
