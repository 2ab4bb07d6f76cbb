"""Monitors: what they measure, when they speak, what they leave, how they stop a run."""

import math
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from runs import Flaky, Pixels, Pull, image_set, images, trainer, weights
from sslzoo.data.images import ImageSet
from sslzoo.downstream.features import feature_std, features, rank_me, raw_pixels
from sslzoo.downstream.knn import knn_top1
from sslzoo.errors import UserError
from sslzoo.monitor import Checkpoint, Metrics, Probe, Stopped, Watch, device_memory_mb
from sslzoo.optim import Optim
from sslzoo.report.csv_log import CsvLog
from sslzoo.views import Clean


def relabelled(images: ImageSet, labels) -> ImageSet:
    return ImageSet(np.asarray(labels, dtype=np.int64), images.classes, images.images, None, images.name)


# Probe


def test_probe_is_knn_on_clean_features_of_both_sets():
    data, encoder = images(), Pixels()
    probe = Probe(data, k=5, temperature=0.1)
    bank, queries = probe.features(encoder)
    train, val = data.train, data.val
    np.testing.assert_array_equal(bank, features(encoder, train, Clean(8))[0])
    np.testing.assert_array_equal(queries, features(encoder, val, Clean(8))[0])
    assert probe.knn(bank, queries) == knn_top1(bank, train.labels, queries, val.labels, 5, 0.1)


def test_raw_pixels_tell_colours_apart_and_shuffled_labels_nothing():
    data = images(image_set(90), image_set(60, seed=1))
    assert Probe(data, k=5).knn(*Probe(data).pixels()) == 1
    rng = np.random.default_rng(0)
    data = images(relabelled(data.train, rng.permutation(data.train.labels)), data.val)
    assert Probe(data, k=5).knn(*Probe(data).pixels()) < 0.6
    np.testing.assert_array_equal(Probe(data).pixels()[1], raw_pixels(data.val, Clean(8))[0])


def test_probe_takes_labelled_rows_first_and_at_most_so_many_always_the_same():
    labels = [-1, 0, 1] * 20
    data = images(relabelled(image_set(60), labels), image_set(30, seed=1))
    probe, again = (Probe(data, bank=17, queries=8) for _ in range(2))
    assert len(probe.bank_rows) == 17
    assert len(probe.query_rows) == 8
    assert all(labels[row] >= 0 for row in probe.bank_rows)
    assert (np.diff(probe.bank_rows) > 0).all()
    assert np.array_equal(probe.bank_rows, again.bank_rows)
    assert Probe(data).bank_rows.tolist() == [row for row in range(60) if labels[row] >= 0]


@pytest.mark.parametrize("missing", ["train labels", "val labels", "val"])
def test_without_labels_or_held_out_images_there_is_no_accuracy_but_a_shape(missing):
    train, val = image_set(), image_set(12, seed=1)
    if missing == "train labels":
        train = relabelled(train, [-1] * 24)
    if missing == "val labels":
        val = relabelled(val, [-1] * 12)
    data = images(train, val)
    data.val = None if missing == "val" else val
    probe = Probe(data, k=3)
    bank, queries = probe.features(Pixels())
    assert probe.knn(bank, queries) is None
    assert len(bank) == 24
    assert len(queries) == (0 if missing == "val" else 12)


def test_damaged_images_leave_the_probe_with_their_labels():
    train = Flaky(image_set(24), {0, 5, 23})
    data = images(train, Flaky(image_set(12, seed=1), {3}), on_error="skip")
    probe = Probe(data, k=3)
    bank, queries = probe.pixels()
    assert sorted({*range(24)} - {*probe.bank_rows}) == [0, 5, 23]
    assert (len(bank), len(queries), len(probe.query_rows)) == (21, 11, 11)
    assert probe.knn(bank, queries) == 1


# Metrics


class Losing(Pull):
    """Notes every loss; from ``nan_at`` on it is not a number."""

    def __init__(self, nan_at: int = 1000):
        super().__init__(Pixels(), Optim(lr=2e-3, lr_per=None))
        self.losses: list[float] = []
        self.nan_at = nan_at

    def loss(self, batch):
        loss = super().loss(batch) * (math.nan if self.step >= self.nan_at else 1)
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize(("parts", "every"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 10)])
def test_each_row_holds_the_mean_loss_of_its_steps_under_accumulation_too(tmp_path, parts, every):
    method, metrics, log = Losing(), Metrics(every), CsvLog(tmp_path / "metrics.csv")
    trainer(metrics, logger=log, accumulate_grad_batches=parts).fit(method, datamodule=images())
    taken, steps = 0, math.ceil(6 / parts)
    rows = iter(log.rows)
    for epoch in range(2):
        for first in range(0, steps, every):
            row, last = next(rows), min(first + every, steps)
            batches = min(last * parts, 6) - first * parts
            assert row["step"] == epoch * steps + last
            assert row["epoch"] == epoch
            assert row["loss"] == pytest.approx(np.mean(method.losses[taken : taken + batches]), rel=1e-5)
            assert row["images_per_second"] > 0
            taken += batches
    assert next(rows, None) is None
    assert metrics.loss == log.rows[-1]["loss"]
    assert metrics.images == 48
    assert metrics.images_per_second == log.rows[-1]["images_per_second"]


def test_rate_in_a_row_is_that_of_its_last_step_and_seconds_are_those_of_training(tmp_path):
    method, metrics, log = Losing(), Metrics(2), CsvLog(tmp_path / "metrics.csv")
    trainer(metrics, logger=log).fit(method, datamodule=images())
    lrs = [method.optim.lr_at(row["step"] - 1, 12, 6) for row in log.rows]
    assert [row["lr"] for row in log.rows] == pytest.approx(lrs)
    assert metrics.seconds == pytest.approx(sum(8 / row["images_per_second"] for row in log.rows))


def test_a_run_that_ends_by_its_steps_has_told_of_the_last_ones():
    metrics = Metrics(10)
    trainer(metrics, max_epochs=-1, max_steps=8, accumulate_grad_batches=2).fit(Pull(), datamodule=images())
    assert metrics.images == 8 * 2 * 4
    assert metrics.seconds > 0
    assert math.isfinite(metrics.loss)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_try():
    with pytest.raises(UserError, match=r"loss is nan at step 4: the run diverged.*optim\.lr=0\.0002 or"):
        trainer(Metrics(2)).fit(Losing(nan_at=2), datamodule=images())


class SaveAt(pl.Callback):
    """Saves a checkpoint after a step and ends the run there."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Stopped(signal.SIGTERM)


def test_a_resumed_run_logs_the_losses_of_an_unbroken_one(tmp_path):
    def start(name, *callbacks, checkpoint=None):
        torch.manual_seed(0)
        metrics, log = Metrics(3), CsvLog(tmp_path / f"{name}.csv")
        fit = trainer(metrics, *callbacks, logger=log).fit
        try:
            fit(Losing(), datamodule=images(), ckpt_path=checkpoint, weights_only=True)
        except Stopped:
            assert callbacks
        return metrics, [row["loss"] for row in log.rows]

    whole, losses = start("whole")
    half, first = start("half", SaveAt(4, tmp_path / "half.ckpt"))
    rest, second = start("rest", checkpoint=tmp_path / "half.ckpt")
    assert (len(first), len(second)) == (1, 3)  # step 4 was seen before, and is counted in the row of step 6
    assert first + second == pytest.approx(losses, rel=1e-6)
    assert rest.images == whole.images == 48
    assert rest.seconds > half.seconds


# Watch


def watching(tmp_path, method, epochs, k=3, **options):
    data = images()
    metrics, log = Metrics(), CsvLog(tmp_path / "metrics.csv")
    watch = Watch(Probe(data, k=k), metrics, **options)
    trainer(metrics, watch, logger=log, max_epochs=epochs).fit(method, datamodule=data)
    return watch, [row for row in log.rows if "feature_std" in row]


@pytest.mark.parametrize(("every", "seen"), [(1, [6, 12, 18]), (2, [12, 18]), (5, [18])])
def test_watch_looks_every_so_many_epochs_and_always_at_the_end(tmp_path, every, seen):
    method = Pull()
    watch, rows = watching(tmp_path, method, 3, every=every)
    assert [row["step"] for row in rows] == seen
    bank, queries = watch.probe.features(method.backbone)
    assert watch.values["feature_std"] == pytest.approx(feature_std(bank))
    assert watch.values["rank_me"] == pytest.approx(rank_me(bank))
    assert watch.values["knn_top1"] == watch.probe.knn(bank, queries) == rows[-1]["knn_top1"]


def test_watch_leaves_the_run_as_it_would_have_been(tmp_path):
    found = []
    for look in (True, False):
        torch.manual_seed(0)
        method = Pull(Pixels(dropout=0.3))
        if look:
            watching(tmp_path, method, 2)
        else:
            trainer().fit(method, datamodule=images())
        found.append(weights(method))
    assert torch.equal(*found)


class Collapsed(Pull):
    """Every image has the same feature, and nothing moves."""

    def __init__(self):
        super().__init__(Pixels(), Optim(lr=1e-12, lr_per=None))
        self.encoder[1].weight.data.zero_()


def test_a_collapsed_run_is_stopped_at_its_first_look_unless_told_to_go_on(tmp_path):
    method = Collapsed()
    with pytest.raises(UserError, match=r"collapse: features have a spread of 0\.000.*monitor\.doctor=false to go on"):
        watching(tmp_path, method, 3)
    assert method.trainer.global_step == 6
    watch, _ = watching(tmp_path, Collapsed(), 3, doctor=False)
    assert watch.values["feature_std"] == pytest.approx(0, abs=1e-6)


class Exploding(Pull):
    """A finite loss whose step leaves weights that are not."""

    def after_step(self):
        if self.step == 5:
            self.encoder[1].weight.fill_(math.inf)


@pytest.mark.parametrize("doctor", [True, False])
def test_weights_that_are_not_finite_end_in_one_clear_line(tmp_path, doctor):
    with pytest.raises(UserError, match="features that are not finite"):
        watching(tmp_path, Exploding(), 2, doctor=doctor)


class AtChance(Pull):
    def loss_at_chance(self):
        return 4.0


@pytest.mark.parametrize(
    ("values", "loss", "step", "told"),
    [
        ({"feature_std": 0.9, "rank_me": 50.0}, 2.0, 50, None),
        ({"feature_std": 0.019, "rank_me": 1.2}, 2.0, 1, r"collapse: .* of 0\.019 .* rank 1\.2; .*optim\.lr=0\.033,"),
        ({"feature_std": 0.021, "rank_me": 1.2}, 2.0, 1, None),
        ({"feature_std": 0.9, "rank_me": 50.0}, 4.001, 26, r"stuck: the loss is 4\.001.*\(4\.000\).*optim\.lr=0\.3 or"),
        ({"feature_std": 0.9, "rank_me": 50.0}, 3.999, 26, "stuck"),
        ({"feature_std": 0.9, "rank_me": 50.0}, 4.001, 25, None),  # a quarter of the run is granted
        ({"feature_std": 0.9, "rank_me": 50.0}, 3.98, 90, None),
    ],
)
def test_the_doctor_tells_collapse_from_standing_still_and_from_health(values, loss, step, told):
    method, metrics = AtChance(Pixels(), Optim(lr=0.1)), Metrics()
    method.step, method.steps, metrics.loss = step, 100, loss
    finding = Watch(Probe(images()), metrics).diagnose(method, values)
    assert finding is None if told is None else re.search(told, finding)


def test_a_method_without_a_loss_of_guessing_is_never_called_stuck():
    method, metrics = Pull(), Metrics()
    method.step, method.steps, metrics.loss = 90, 100, 4.0
    assert Watch(Probe(images()), metrics).diagnose(method, {"feature_std": 0.9, "rank_me": 50.0}) is None


# Checkpoint


class Noted(Checkpoint):
    """Notes at which steps it writes, and writes."""

    def write(self, trainer):
        self.at = [*getattr(self, "at", []), trainer.global_step]
        super().write(trainer)


@pytest.mark.parametrize(
    ("options", "parts", "expected"),
    [
        ({}, 1, [6, 12]),
        ({"steps": 4}, 1, [4, 6, 8, 12]),
        ({"minutes": 0}, 2, [1, 2, 3, 4, 5, 6]),
        ({"steps": 1}, 4, [1, 2, 3, 4]),
    ],
)
def test_checkpoints_are_written_at_epochs_and_as_often_as_asked_but_never_within_a_step(
    tmp_path, options, parts, expected
):
    checkpoint = Noted(tmp_path, **options)
    method = Pull()
    trainer(checkpoint, accumulate_grad_batches=parts).fit(method, datamodule=images())
    assert checkpoint.at == expected
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == expected[-1]
    assert torch.equal(state["state_dict"]["encoder.1.weight"], method.encoder[1].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


class Signal(pl.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer, method, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_writes_and_stops_with_the_shells_code(tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match=number.name) as stopped:
        trainer(Checkpoint(tmp_path), Signal(number, 3)).fit(Pull(), datamodule=images())
    assert stopped.value.code == 128 + number
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def many_ranks(step: int, is_zero: bool = True, others_ask: bool = False):
    """What a Checkpoint sees of a trainer on two ranks."""
    asked, saved = [], []

    def decide(mine, all):
        asked.append(mine)
        return mine or (others_ask and len(asked) == 1)

    return SimpleNamespace(
        world_size=2,
        global_step=step,
        accumulate_grad_batches=1,
        num_training_batches=100,
        is_global_zero=is_zero,
        strategy=SimpleNamespace(reduce_boolean_decision=decide),
        save_checkpoint=lambda path: (saved.append(path), path.write_bytes(b"whole") if is_zero else None),
        asked=asked,
        saved=saved,
    )


def test_many_ranks_agree_only_every_ten_steps(tmp_path):
    checkpoint = Checkpoint(tmp_path, minutes=0, steps=7)
    for step in range(1, 31):
        seen = many_ranks(step)
        checkpoint.on_train_batch_end(seen, None, None, None, step - 1)
        assert bool(seen.asked) == bool(seen.saved) == (step % 10 == 0)


def test_a_signal_to_another_rank_stops_this_one_too(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint._written = math.inf
    seen = many_ranks(20, is_zero=False, others_ask=True)
    with pytest.raises(Stopped, match="SIGTERM"):
        checkpoint.on_train_batch_end(seen, None, None, None, 19)
    assert seen.saved == [tmp_path / "last.ckpt"]  # every rank takes part; only rank 0 writes
    assert not list(tmp_path.iterdir())


def test_peak_memory_of_this_process_is_that_of_the_system():
    import resource

    found = device_memory_mb(torch.device("cpu"))
    assert found == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.05)
    assert 100 < found < 100_000
