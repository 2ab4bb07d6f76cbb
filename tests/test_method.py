"""The plumbing of a method under a real trainer: rate, steps, hooks, memories, randomness."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from runs import Pixels, Pull, images, trainer, weights
from sslzoo.blocks.norm import SyncBatchNorm
from sslzoo.memory import Bank, Queue
from sslzoo.method import Batch
from sslzoo.optim import Optim, warmup_cosine


class Recorder(Pull):
    """Writes down what is called, in which order, and what it finds."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls: list[tuple] = []
        self.queue, self.bank = Queue(6, 5), Bank(24, 5)

    def loss(self, batch):
        self.calls.append(("loss", self.step, weights(self.encoder)))
        return super().loss(batch)

    def before_step(self):
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        grads = torch.cat([p.grad.flatten() for p in self.encoder.parameters()])
        self.calls.append(("before", self.step, weights(self.encoder), lr, grads))

    def after_step(self):
        self.calls.append(("after", self.step, weights(self.encoder), self.progress, torch.is_grad_enabled()))

    def called(self, name):
        return [call for call in self.calls if call[0] == name]


@pytest.fixture(scope="module", params=[1, 2])
def recorded(request):
    torch.manual_seed(0)
    method = Recorder(Pixels(), Optim(lr=2e-3, lr_per=None, warmup_epochs=1, start_lr=0.1))
    trainer(max_epochs=3, accumulate_grad_batches=request.param).fit(method, datamodule=images())
    return request.param, method


def test_hooks_are_called_once_an_optimizer_step_also_under_accumulation(recorded):
    parts, method = recorded
    assert [call[0] for call in method.calls] == ([*["loss"] * parts, "before", "after"]) * (18 // parts)


def test_before_step_meets_the_gradients_and_after_step_the_moved_weights(recorded):
    _, method = recorded
    for before, after in zip(method.called("before"), method.called("after"), strict=True):
        assert before[4].any()
        assert not torch.equal(before[2], after[2])
        assert not after[4]
    losses = method.called("loss")
    assert torch.equal(losses[-1][2], method.called("before")[-1][2])


def test_rate_of_every_step_is_the_schedules(recorded):
    parts, method = recorded
    total, epoch = 18 // parts, 6 // parts
    expected = [warmup_cosine(step, total, epoch, 2e-3, 0.0, 2e-4) for step in range(total)]
    assert [call[3] for call in method.called("before")] == pytest.approx(expected)


def test_step_counts_optimizer_steps_and_progress_is_its_share(recorded):
    parts, method = recorded
    total = 18 // parts
    assert (method.steps, method.epochs, method.steps_per_epoch) == (total, 3, 6 / parts)
    assert [call[1] for call in method.called("loss")] == [step for step in range(total) for _ in range(parts)]
    assert [call[1] for call in method.called("after")] == list(range(total))
    assert [call[3] for call in method.called("after")] == pytest.approx([step / total for step in range(total)])


def test_a_last_part_that_is_short_still_makes_a_step_and_epochs_stay_whole():
    method = Recorder(Pixels(), Optim(lr=1e-4, lr_per=None, per_epoch=True))
    trainer(max_epochs=2, accumulate_grad_batches=4).fit(method, datamodule=images())  # 6 batches: 4 and 2
    assert len(method.called("after")) == method.steps == 4
    assert (method.steps_per_epoch, method.epochs) == (2, 2)
    assert [call[3] for call in method.called("before")] == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5])


def test_max_steps_ends_the_run_and_its_schedules():
    method = Recorder(Pixels(), Optim(lr=2e-3, lr_per=None))
    trainer(max_epochs=-1, max_steps=8).fit(method, datamodule=images())
    assert method.steps == len(method.called("after")) == 8
    assert method.called("before")[-1][3] == pytest.approx(warmup_cosine(7, 8, 0, 2e-3))


def test_memories_and_nothing_else_are_exempt_from_ddps_broadcast(recorded):
    _, method = recorded
    exempt = {"queue.keys", "queue.pointer", "bank.slots", "bank.updates", "bank.seed"}
    assert set(method._ddp_params_and_buffers_to_ignore) == exempt


class SaveAt(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, method, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.max_steps = self.step  # at once, not at the end of the epoch


@pytest.mark.parametrize("step", [4, 6, 7])
def test_dropout_after_a_resume_is_that_of_the_unbroken_run(tmp_path, step):
    def start(*callbacks, checkpoint=None, seed=0):
        torch.manual_seed(seed)
        method, data = Pull(Pixels(dropout=0.5)), images()
        trainer(*callbacks, max_epochs=2).fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return weights(method)

    unbroken = start()
    broken = start(SaveAt(step, tmp_path / "half.ckpt"))
    assert unbroken.isfinite().all()
    assert not torch.equal(broken, unbroken)
    assert torch.equal(start(checkpoint=tmp_path / "half.ckpt", seed=9), unbroken)


def test_dropout_differs_between_steps_parts_and_seeds():
    found = []

    class Dropped(Pull):
        def loss(self, batch):
            with torch.no_grad():
                found.append(nn.functional.dropout(torch.ones(64)))
            return super().loss(batch)

    for seed in (0, 1):
        method = Dropped()
        method.seed = seed
        trainer(max_epochs=1, accumulate_grad_batches=2).fit(method, datamodule=images())
    assert len(found) == 12
    assert len({tuple(mask.tolist()) for mask in found}) == 12


class Synced(Pull):
    sync_batchnorm = True


@pytest.mark.parametrize(("kind", "world", "synced"), [(Synced, 2, True), (Synced, 1, False), (Pull, 2, False)])
def test_batchnorm_is_over_all_ranks_where_a_method_asks_for_it_and_there_are_several(kind, world, synced):
    seen = SimpleNamespace(world_size=world, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    scale = encoder[1].weight
    method = type("Method", (kind,), {"trainer": seen})(encoder)
    method.configure_model()
    assert isinstance(method.encoder[1], SyncBatchNorm) == synced
    assert method.encoder[1].weight is scale


def test_a_method_trains_in_a_loop_of_ones_own():
    method = Recorder(Pixels())
    optimizer = method.optim.build(method.parameter_groups())
    method.before_step = lambda: None  # the recorder's asks for a trainer
    batch = Batch([torch.randn(4, 3, 8, 8) for _ in range(2)], torch.arange(4), torch.full((4,), -1))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = method.loss(batch)
        loss.backward()
        method.before_step()
        optimizer.step()
        method.after_step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_a_method_does_not_define_changes_nothing():
    method = Pull()
    before = weights(method)
    method.check(7)
    method.check_views([torch.zeros(1, 3, 8, 8)])
    method.before_step()
    method.after_step()
    assert torch.equal(weights(method), before)
    assert method.backbone is method.encoder
    assert method.loss_at_chance() is None
    assert (method.step, method.steps, method.progress) == (0, 1, 0)
    (group,) = method.parameter_groups()
    assert [id(p) for p in group["params"]] == [id(p) for p in method.encoder.parameters()]


def test_every_rank_begins_with_the_memories_of_rank_zero(monkeypatch):
    sent = []
    monkeypatch.setattr("sslzoo.method.from_rank_zero", sent.append)
    method = Recorder(Pixels())
    trainer(max_steps=1).fit(method, datamodule=images())
    assert {id(x) for x in sent} == {id(x) for part in (method.queue, method.bank) for x in part.buffers()}


@pytest.mark.parametrize("epoch", [0, 1, 1.5, 2, 3])
def test_an_epochs_first_step_is_the_first_that_is_not_before_it(epoch):
    method = Pull()
    method.steps, method.epochs = 10, 4
    before = [step for step in range(11) if step * 4 / 10 < epoch]
    assert method.first_step(epoch) == len(before)
