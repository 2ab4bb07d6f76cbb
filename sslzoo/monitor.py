"""What watches a run from outside: speed, kNN accuracy, collapse, checkpoints. None of it touches the method."""

import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sslzoo.checkpoints.files import write_whole
from sslzoo.data.images import ImageSet
from sslzoo.data.module import Images
from sslzoo.downstream.features import feature_std, features, rank_me, raw_pixels
from sslzoo.downstream.knn import knn_top1
from sslzoo.errors import UserError
from sslzoo.method import Method


class Stopped(Exception):
    """A signal ended the run, after its checkpoint was written; ``code`` is what a shell expects of it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@dataclass
class Probe:
    """kNN accuracy and shape of the features on fixed rows of the data.

    The vote is InstDisc's: k neighbours by cosine, weight ``exp(similarity / T)``, no augmentation, no gradient.

    Args:
        data: training and held-out images; without a held-out set or labels accuracies are None.
        k, temperature: of the vote.
        bank, queries: at most so many training and held-out images, drawn once.
    """

    data: Images
    k: int = 20
    temperature: float = 0.07
    bank: int = 10000
    queries: int = 2000
    bank_rows: np.ndarray = field(init=False)
    query_rows: np.ndarray = field(init=False)

    def __post_init__(self):
        train, val = self.data.train, self.data.val
        self.bank_rows = _some_rows(train, self.bank)
        self.query_rows = _some_rows(val, self.queries) if val is not None else self.bank_rows[:0]
        self.labelled = bool(len(self.query_rows)) and all(
            (images.labels[rows] >= 0).all() for images, rows in ((train, self.bank_rows), (val, self.query_rows))
        )

    def features(self, encoder, half: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Unit features of the bank's and the queries' rows, ``(n, D)`` and ``(m, D)``."""
        return self._both(
            lambda images, rows: features(
                encoder, images, self.data.clean, rows, half=half, on_error=self.data.on_error
            )
        )

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """The same of raw pixels."""
        return self._both(lambda images, rows: raw_pixels(images, self.data.clean, rows, on_error=self.data.on_error))

    def _both(self, extract) -> tuple[np.ndarray, np.ndarray]:
        bank, self.bank_rows = extract(self.data.train, self.bank_rows)
        if not len(self.query_rows):
            return bank, bank[:0]
        queries, self.query_rows = extract(self.data.val, self.query_rows)
        return bank, queries

    def knn(self, bank: np.ndarray, queries: np.ndarray) -> float | None:
        """Top-1 accuracy of ``queries`` against ``bank``, 0 to 1; None where labels are missing."""
        if not self.labelled:
            return None
        labels, truth = self.data.train.labels[self.bank_rows], self.data.val.labels[self.query_rows]
        return knn_top1(bank, labels, queries, truth, self.k, self.temperature)


def _some_rows(images: ImageSet, limit: int) -> np.ndarray:
    known = np.flatnonzero(images.labels >= 0)
    rows = known if len(known) else np.arange(len(images))
    return rows if len(rows) <= limit else np.sort(np.random.default_rng(0).choice(rows, limit, replace=False))


class Metrics(pl.Callback):
    """Loss, rate and speed every ``every`` steps, kept on the device until then; NaN stops the run.

    Attributes:
        loss: the last logged mean loss.
        seconds: time spent in training steps, over all resumes; the probe's time is not in it.
    """

    def __init__(self, every: int = 10):
        self.every = every
        self.loss, self.seconds, self.images, self.images_per_second = float("nan"), 0.0, 0, 0.0
        self._sum: Tensor | None = None
        self._count, self._since = 0, 0.0

    def state_dict(self) -> dict:
        unlogged = 0.0 if self._sum is None else self._sum.item()
        return {
            "seconds": self.seconds,
            "images": self.images,
            "loss": self.loss,
            "unlogged": unlogged,
            "count": self._count,
        }

    def load_state_dict(self, state: dict) -> None:
        self.seconds, self.images, self.loss = state["seconds"], state["images"], state["loss"]
        self._count, self._since = state["count"], time.perf_counter()
        self._sum = torch.tensor(state["unlogged"]) if self._count else None

    def on_train_batch_start(self, trainer, method, batch, batch_idx) -> None:
        if self._count == 0:
            self._since = time.perf_counter()

    def on_train_batch_end(self, trainer, method: Method, outputs, batch, batch_idx) -> None:
        loss = outputs["loss"].detach()
        self._sum = loss.float() if self._sum is None else self._sum.to(loss.device) + loss
        self._count += 1
        last = batch_idx + 1 == trainer.num_training_batches or trainer.global_step == trainer.max_steps
        if self._count == self.every * trainer.accumulate_grad_batches or last:
            self._log(trainer, method, len(batch.index) * trainer.world_size)

    def _log(self, trainer, method: Method, batch_size: int) -> None:
        assert self._sum is not None
        # Lightning has divided by the number of accumulated parts
        self.loss = self._sum.item() / self._count * trainer.accumulate_grad_batches
        elapsed = time.perf_counter() - self._since
        self.seconds += elapsed
        self.images += self._count * batch_size
        self.images_per_second = self._count * batch_size / elapsed
        self._sum, self._count = None, 0
        group = trainer.optimizers[0].param_groups[0]
        lr = group["lr"] / group.get("lr_scale", 1.0)
        log(trainer, {"loss": self.loss, "lr": lr, "images_per_second": self.images_per_second})
        if not math.isfinite(self.loss):
            raise UserError(
                f"loss is {self.loss} at step {trainer.global_step}: the run diverged, most likely from a rate too high"
                f" or half precision; try {method.settings}.lr={method.optim.lr / 10:.2g} or trainer.precision=32-true"
            )


class Watch(pl.Callback):
    """kNN accuracy and the collapse doctor every ``every`` epochs.

    Attributes:
        values: the last findings: ``knn_top1``, ``feature_std``, ``rank_me``.
    """

    COLLAPSED = 0.02  # spread of features, as a share of that of directions spread evenly

    def __init__(self, probe: Probe, metrics: Metrics, every: int = 1, doctor: bool = True):
        self.probe, self.metrics, self.every, self.doctor = probe, metrics, every, doctor
        self.values: dict[str, float | None] = {}

    def on_train_epoch_end(self, trainer, method: Method) -> None:
        if (trainer.current_epoch + 1) % self.every and trainer.global_step < method.steps:
            return
        finding = None
        if trainer.is_global_zero:
            half = str(trainer.precision).startswith("bf16")
            try:
                bank, queries = self.probe.features(method.backbone, half=half)
                self.values = shape(bank) | {"knn_top1": self.probe.knn(bank, queries)}
                log(trainer, self.values)
                finding = self.diagnose(method, self.values) if self.doctor else None
            except UserError as error:  # every rank raises it, or the others would wait for this one
                finding = str(error)
        finding = trainer.strategy.broadcast(finding)
        if finding:
            raise UserError(finding)

    def diagnose(self, method: Method, values: dict) -> str | None:
        """One line that names what went wrong, why, and what to try; None where nothing did."""
        if values["feature_std"] < self.COLLAPSED:
            return (
                f"collapse: features have a spread of {values['feature_std']:.3f} (1 is even, 0 is a point) and rank"
                f" {values['rank_me']:.1f}; images are no longer told apart, most likely from a rate too high or a"
                f" target that moves too fast; try optim.lr={method.optim.lr / 3:.2g}, or monitor.doctor=false to go on"
            )
        chance = method.loss_at_chance()
        if chance is not None and method.progress > 0.25 and abs(self.metrics.loss / chance - 1) < 0.002:
            return (
                f"stuck: the loss is {self.metrics.loss:.3f}, that of guessing ({chance:.3f}), after a quarter of the"
                " run; most likely the rate is too low or the views are too hard; try"
                f" optim.lr={method.optim.lr * 3:.2g} or views=mild, or monitor.doctor=false to go on"
            )
        return None


def shape(z: np.ndarray) -> dict[str, float]:
    """Spread and rank of unit features ``(n, D)``."""
    return {"feature_std": feature_std(z), "rank_me": rank_me(z)}


def log(trainer: pl.Trainer, values: dict) -> None:
    """Send one row to every logger, under the current step."""
    row = {key: value for key, value in values.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": trainer.current_epoch, **row}, step=trainer.global_step)


class Checkpoint(pl.Callback):
    """``last.ckpt``: at the end of an epoch, every ``minutes``, every ``steps``, and when a signal asks to stop.

    SIGTERM and SIGINT let the current step end, write the checkpoint and raise ``Stopped``.
    """

    EVERY = 10  # steps between two questions to all ranks

    def __init__(self, run_dir: Path, minutes: float = 10, steps: int | None = None):
        self.path, self.minutes, self.steps = Path(run_dir) / "last.ckpt", minutes, steps
        self._written = 0.0
        self._asked: int | None = None
        self._handlers: dict = {}

    def on_train_start(self, trainer, method) -> None:
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:  # where max_steps is given Lightning would go on in the epoch that has ended
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False
        self._written = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        self._asked = number

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients of a half-accumulated step are not in a checkpoint
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the epoch's end, with its kNN, comes first
        if trainer.world_size > 1 and trainer.global_step % self.EVERY:
            return  # ranks agree rarely: to ask costs a synchronisation
        due = time.monotonic() - self._written > 60 * self.minutes
        due |= bool(self.steps) and trainer.global_step % self.steps == 0
        asked = self._stop_asked(trainer)
        if trainer.strategy.reduce_boolean_decision(due, all=False) or asked:
            self.write(trainer)
        if asked:
            raise Stopped(self._asked or signal.SIGTERM)

    def on_train_epoch_end(self, trainer, method) -> None:
        self.write(trainer)
        if self._stop_asked(trainer) and trainer.global_step < method.steps:
            raise Stopped(self._asked or signal.SIGTERM)

    def _stop_asked(self, trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False)

    def write(self, trainer) -> None:
        """Write the checkpoint, whole; every rank takes part."""
        if trainer.is_global_zero:
            write_whole(self.path, lambda partial: trainer.save_checkpoint(partial))
        else:
            trainer.save_checkpoint(self.path)
        self._written = time.monotonic()

    def teardown(self, trainer, method, stage) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def device_memory_mb(device: torch.device) -> float:
    """Peak memory of the run: on the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
