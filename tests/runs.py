"""A whole training run in a moment: a few small images, a linear encoder, a real trainer."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sslzoo.__main__ import main
from sslzoo.data.decode import CorruptImage
from sslzoo.data.images import ImageSet
from sslzoo.data.module import Images
from sslzoo.method import Batch, Method
from sslzoo.monitor import Metrics
from sslzoo.optim import Optim
from sslzoo.report.csv_log import read_rows
from sslzoo.tasks import dense
from sslzoo.views import Clean, View, Views


def image_set(count: int = 24, size: int = 8, seed: int = 0) -> ImageSet:
    """Reddish, greenish and bluish noise, in turns."""
    labels = np.arange(count) % 3
    pixels = np.random.default_rng(seed).integers(0, 100, (count, size, size, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, labels] += 150
    return ImageSet(labels.astype(np.int64), ["red", "green", "blue"], pixels, None, "noise")


def archive(path: Path, count: int = 64, size: int = 16) -> Path:
    """The same on disk for ``data=npz``, with fewer images held out."""
    train, val = image_set(count, size), image_set(24, size, seed=1)
    np.savez(path, train_images=train.images, train_labels=train.labels, val_images=val.images, val_labels=val.labels)
    return path


class Flaky(ImageSet):
    """A set on disk of which some rows cannot be read."""

    def __init__(self, whole: ImageSet, broken=(), slow: float = 0.0):
        super().__init__(whole.labels, whole.classes, None, None, whole.name)
        self.whole, self.broken, self.slow = whole, set(broken), slow

    def read(self, i):
        time.sleep(self.slow)
        if i in self.broken:
            raise CorruptImage(f"{i}.png", "it is damaged")
        return self.whole.images[i]


def images(train: ImageSet | None = None, val: ImageSet | None = None, batch_size: int = 4, **options) -> Images:
    """The data of such a run: two views of 8 pixels."""
    train = image_set() if train is None else train
    val = image_set(12, seed=1) if val is None else val
    return Images(train, val, Views([View(8, count=2)]), Clean(8), batch_size, workers=1, **options)


class Pixels(nn.Sequential):
    """A linear encoder on 8 x 8 images."""

    def __init__(self, dim: int = 5, dropout: float = 0.0):
        super().__init__(nn.Flatten(), nn.Linear(192, dim), nn.Dropout(dropout))
        self.dim = dim


class Pull(Method):
    """Pulls two views together, and features towards one."""

    def __init__(self, encoder: nn.Module | None = None, optim: Optim | None = None):
        super().__init__(encoder or Pixels(), optim or Optim(lr=1e-3, lr_per=None))

    def loss(self, batch: Batch) -> Tensor:
        h1, h2 = (self.encoder(x) for x in batch.views)
        return (h1 - h2).square().mean() + (h1 - 1).square().mean()


def trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
    """A trainer that leaves nothing behind."""
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **{"max_epochs": 2, "devices": 1, **options},
    )


def weights(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Killed(Exception):
    """What ends a run in the middle."""


@contextmanager
def killed_before(step: int, part: Path | None = None) -> Iterator[None]:
    """What runs inside is killed before an optimizer step; where a run has parts, in that of the folder ``part``."""
    original = Metrics.on_train_batch_start

    def die(self, trainer, *rest):
        there = part is None or (part.is_dir() and not (part / "summary.json").is_file())
        if trainer.global_step == step and there:
            raise Killed
        original(self, trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "on_train_batch_start", die)
        with pytest.raises(Killed):
            yield


def in_this_process(commands, logs, jobs, tick):
    """Cells one after the other, without the seconds that a process takes to start."""
    codes = {}
    for name, words in commands.items():
        codes[name] = main(words)
        tick(codes)
    return {name: "it failed" for name, code in codes.items() if code}


def checkpoint_of(run_dir: Path) -> dict:
    """A run's ``last.ckpt``."""
    return torch.load(run_dir / "last.ckpt", weights_only=True)


def assert_same_run(a: Path, b: Path, steps: int) -> None:
    """Two finished runs of ``steps`` have the same weights, memories, optimizer, kNN and final loss, to the bit."""
    one, other = checkpoint_of(a), checkpoint_of(b)
    assert one["global_step"] == other["global_step"] == steps
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for mine, theirs in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        assert mine["state"].keys() == theirs["state"].keys()
        for parameter, state in mine["state"].items():
            assert state.keys() == theirs["state"][parameter].keys()
            for name, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][parameter][name])), name
    rows = [[row for row in read_rows(d / "metrics.csv") if "knn_top1" in row] for d in (a, b)]
    for row in rows[0] + rows[1]:
        row.pop("images_per_second", None)
    assert rows[0]
    assert rows[0] == rows[1]
    finals = [json.loads((d / "summary.json").read_text()) for d in (a, b)]
    for key in ("loss", "knn_top1", "steps", "epochs", "config_hash"):
        assert finals[0][key] == finals[1][key], key


def counted(monkeypatch, module, name: str) -> list[tuple]:
    """Arguments of the calls of ``module.name`` from now on; it still does what it did."""
    calls, original = [], getattr(module, name)

    def call(*arguments, **options):
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, call)
    return calls


def as_second_rank(monkeypatch) -> None:
    """Let a task on stage maps believe, once it has trained, that it is not the rank that writes."""
    original = dense.fit

    def fit(*arguments):
        trainer = original(*arguments)
        return SimpleNamespace(is_global_zero=False, strategy=trainer.strategy)

    monkeypatch.setattr(dense, "fit", fit)
