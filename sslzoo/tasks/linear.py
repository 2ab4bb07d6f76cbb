"""A linear classifier on the frozen backbone, its rate chosen on training images only."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from sslzoo.blocks import Encoder
from sslzoo.data.module import Images
from sslzoo.downstream.cache import Cache, cache_folder, weights_hash
from sslzoo.downstream.features import KINDS, check_size
from sslzoo.downstream.interval import interval
from sslzoo.downstream.labels import labelled_images
from sslzoo.downstream.linear import Heads, Outcome, cached, held_out
from sslzoo.errors import UserError
from sslzoo.optim import CHOICES, Optim
from sslzoo.report.csv_log import CsvLog
from sslzoo.report.progress import console
from sslzoo.report.rates import rate_curves, rate_table
from sslzoo.tasks.runs import backbone_and_config, device, images, provenance, write_summary
from sslzoo.tasks.training import fit, leave_cores_to_views, read_checkpoint, resumed, started
from sslzoo.views import View, Views

PROTOCOLS = {"cached": ["last"], "paper": ["last", "last4"]}
"""The protocols, and the features they take unless told otherwise."""

RATE = {"cached": "L2 strength", "paper": "learning rate"}

INSTEAD = {
    "trainer.max_epochs=": "task.epochs",
    "data.batch_size=": "task.batch_size",
    "optim.": "task.lrs, task.schedule, task.momentum or task.weight_decay",
    "views": "no views: crops and flips are the protocol's",
}
"""What pretraining calls otherwise."""


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Linear accuracy of ``config.backbone`` on ``config.data``, and its curve over rates."""
    checkpoint = None
    if config.resume is not None:
        config, checkpoint = resumed(config, overrides)
    pl.seed_everything(config.seed, verbose=False)
    task, settings = config.task, config.data
    kinds, rates = choices(task, overrides)
    encoder, sized = backbone_and_config(OmegaConf.merge(config, {}))
    data = images(sized)
    chosen_by = settings.label_fraction, settings.label_list, config.seed
    data.train, data.val = labelled_images("linear", data.train, data.val, *chosen_by)
    held = held_out(data.train.labels, task.selection, config.seed) if len(kinds) * len(rates) > 1 else None
    dims = check_size(encoder, sized.image_size, kinds)
    began = time.perf_counter()
    if task.protocol == "cached":
        cache = Cache(cache_folder(task.cache), task.cache_limit_mb)
        run_dir = started(config, overrides)
        found, rows = from_cache(encoder, data, cache, kinds, rates, config), []
    else:
        heads, crops = on_crops(encoder, data, dims, rates, held, sized)
        state = read_checkpoint(checkpoint, heads, f"task=linear of {config.backbone}") if checkpoint else None
        run_dir = started(config, overrides)
        found, rows = train(heads, crops, config, run_dir, checkpoint, state)
    if found is None:
        return {}
    best = found.curve[found.chosen]
    summary = {
        "task": "linear",
        "method": encoder.metadata["method"],
        "data": data.train.name,
        "linear_top1": float(found.top1.mean()),
        "linear_top5": float(found.top5.mean()),
        "linear_top1_interval": list(interval(found.top1)),
        "lr": best["lr"],
        "lr_is": RATE[task.protocol],
        "lr_curve": found.curve,
        "features": best["features"],
        "protocol": task.protocol,
        "epochs": task.epochs if task.protocol == "paper" else 0,
        "seconds": time.perf_counter() - began,
        "backbone": str(config.backbone),
        "weights": weights_hash(encoder),
        "pretrained": encoder.metadata.get("pretrained", config.backbone != "random"),
        **provenance(config, overrides),
    }
    title = f"{summary['method']} on {summary['data']}, {task.protocol}"
    rate_curves(found.curve, found.chosen, run_dir / "curves.png", title, RATE[task.protocol], rows)
    write_summary(run_dir, summary)
    low, high = summary["linear_top1_interval"]
    console.print(rate_table(found.curve, found.chosen, RATE[task.protocol]))
    console.print(
        f"linear top-1 {100 * summary['linear_top1']:.2f} % [{100 * low:.2f}, {100 * high:.2f}] ({best['features']},"
        f" {RATE[task.protocol]} {best['lr']:g}, {len(found.top1)} held-out images of {data.train.name})"
        f" -> {run_dir}/summary.json",
        markup=False,
    )
    return summary


def choices(task: DictConfig, overrides: Sequence[str]) -> tuple[list[str], list[float]]:
    """The kinds of features and the rates that are tried.

    Raises:
        UserError: on a value that cannot be, naming those that can, and on a setting of pretraining that was typed.
    """
    if task.protocol not in PROTOCOLS:
        raise UserError(f"task.protocol={task.protocol} is none of {', '.join(PROTOCOLS)}")
    kinds = list(task.features or PROTOCOLS[task.protocol]) if not isinstance(task.features, str) else [task.features]
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise UserError(f"task.features={wrong[0]} is none of {', '.join(KINDS)}")
    for override in overrides if task.protocol == "paper" else ():
        own = next((own for typed, own in INSTEAD.items() if override.startswith(typed)), None)
        if own:
            raise UserError(f"{override} is pretraining's; for task=linear type {own}")
    key = "strengths" if task.protocol == "cached" else "lrs"
    rates = list(task[key])
    if not rates or not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        raise UserError(f"task.{key}={rates} must be one or more numbers above 0, e.g. [0.1, 1]")
    if task.schedule not in CHOICES["schedule"]:
        raise UserError(f"task.schedule={task.schedule} is none of {', '.join(CHOICES['schedule'])}")
    if task.protocol == "paper" and task.epochs < 1:
        raise UserError(f"task.epochs={task.epochs} trains nothing; give 1 or more")
    return list(dict.fromkeys(kinds)), rates


def from_cache(
    encoder: Encoder, data: Images, cache: Cache, kinds: Sequence[str], strengths: Sequence[float], config: DictConfig
) -> Outcome:
    """The ``cached`` protocol: logistic regressions on features computed once."""
    learnt, rows = cache.features(encoder, data.train, data.clean, kinds, on_error=data.on_error)
    asked, asked_rows = cache.features(encoder, data.val, data.clean, kinds, on_error=data.on_error)
    labels, truth = data.train.labels[rows], data.val.labels[asked_rows]
    where = next(encoder.parameters()).device.type
    return cached(learnt, labels, asked, truth, strengths, config.task.selection, config.seed, where)


def on_crops(
    encoder: Encoder,
    data: Images,
    dims: dict[str, int],
    lrs: Sequence[float],
    held: np.ndarray | None,
    config: DictConfig,
) -> tuple[Heads, Images]:
    """The ``paper`` protocol: classifiers of every rate, and batches of random crops for them.

    Raises:
        UserError: if the batch is larger than the set.
    """
    task = config.task
    if not 0 < task.batch_size <= len(data.train):
        raise UserError(
            f"task.batch_size={task.batch_size} does not fit {data.train.name} with its {len(data.train)} labelled"
            f" training images; set it to 1 ... {len(data.train)}"
        )
    optim = Optim(
        lr=1.0,
        batch_size=task.batch_size,
        schedule=task.schedule,
        milestones=tuple(task.milestones),
        per_epoch=task.schedule == "step",
        momentum=task.momentum,
        weight_decay=task.weight_decay,
    )
    hidden = None if held is None else np.isin(np.arange(len(data.train)), held)
    classes = int(data.train.labels.max()) + 1
    heads = Heads(encoder, dims, classes, lrs, optim, hidden, task.nesterov, config.seed)
    crop = View(config.image_size, scale=(0.08, 1.0))
    views = Views([crop], config.data.mean, config.data.std, seed=config.seed)
    loading = {"seed": config.seed, "workers": config.data.workers, "on_error": data.on_error}
    return heads, Images(data.train, data.val, views, data.clean, task.batch_size, **loading)


def train(
    heads: Heads, crops: Images, config: DictConfig, run_dir: Path, checkpoint: Path | None, state: dict | None
) -> tuple[Outcome | None, list[dict]]:
    """Train ``heads``, and score them; also the rows of ``metrics.csv``. None on ranks other than 0."""
    on = device(config)
    leave_cores_to_views(on[0], config)
    log = CsvLog(run_dir / "metrics.csv")
    if config.resume:
        log.forget_after(state["global_step"] if state else 0)
    lasting = OmegaConf.merge(config, {"trainer": {"max_epochs": config.task.epochs}})
    trainer = fit(heads, crops, lasting, run_dir, checkpoint, log, [Epochs()], on)
    if not trainer.is_global_zero:
        return None, log.rows
    heads.to(trainer.strategy.root_device)
    return heads.outcome(crops.train, crops.val, crops.clean, crops.on_error), log.rows


class Epochs(pl.Callback):
    """A row of ``metrics.csv`` and a line each epoch: the mean loss of the best classifier, rate, speed."""

    def on_train_epoch_start(self, trainer, heads: Heads) -> None:
        self.sum, self.since = None, time.perf_counter()

    def on_train_batch_end(self, trainer, heads: Heads, outputs, batch, batch_idx) -> None:
        losses = torch.stack([each[0] for each in heads.losses.values()])  # of those that see all images, (K, R)
        self.sum = losses if self.sum is None else self.sum + losses

    def on_train_epoch_end(self, trainer, heads: Heads) -> None:
        if not trainer.is_global_zero:
            return
        count, seconds = trainer.num_training_batches, time.perf_counter() - self.since
        best = (self.sum / count).nan_to_num(float("inf")).min().item()
        speed = count * trainer.datamodule.batch_size / seconds
        row = {"epoch": trainer.current_epoch, "loss": best, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        for logger in trainer.loggers:
            logger.log_metrics({**row, "images_per_second": speed}, step=trainer.global_step)
        left = seconds * (trainer.max_epochs - trainer.current_epoch - 1)
        console.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  loss of the best {best:.3f}"
            f"  {speed:.0f} images/s  {left:.0f} s left"
        )
