"""What the tasks that train share: the trainer, going on with a run that was stopped, and learning to name classes."""

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import faiss
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from sslzoo.blocks import Encoder
from sslzoo.blocks.strides import one_pixel_strides
from sslzoo.checkpoints.files import write_text
from sslzoo.config import built, composed, differences, plain
from sslzoo.data.box_module import Boxes
from sslzoo.data.mixed import Mixed
from sslzoo.data.module import Images, default_workers
from sslzoo.downstream.base import Downstream, Evaluate
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import Checkpoint, Metrics, Stopped
from sslzoo.moving_teacher import TaughtStudent
from sslzoo.optim import Optim
from sslzoo.report.csv_log import CsvLog
from sslzoo.report.progress import Bar, console
from sslzoo.selftrain import Student
from sslzoo.tasks.runs import claim_run_dir, device, images, more_loggers


def fit(
    method: Method,
    data: Images,
    config: DictConfig,
    run_dir: Path,
    checkpoint: Path | None,
    rows: CsvLog,
    callbacks: list[pl.Callback],
    on: tuple[str, str],
) -> pl.Trainer:
    """Train ``method`` as ``config.trainer`` says, from ``checkpoint`` where there is one; ``last.ckpt`` is written.

    Args:
        callbacks: what comes before the checkpoint is in it.
        on: accelerator and precision, see ``device``.
    """
    accelerator, precision = on
    trainer = pl.Trainer(
        accelerator=accelerator,
        precision=precision,
        logger=[rows, *more_loggers(config, run_dir)],
        callbacks=[*callbacks, Checkpoint(run_dir, **config.checkpoint)],
        strategy="auto" if config.trainer.devices in ("auto", 1, "1") and torch.cuda.device_count() < 2 else "ddp",
        **{key: value for key, value in config.trainer.items() if key not in ("accelerator", "precision")},
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    try:
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stopped:
        console.print(f"{stopped}: stopped at step {trainer.global_step}; python -m sslzoo resume={run_dir} goes on")
        raise
    return trainer


@torch.no_grad()
def check_strides(config: DictConfig, encoder: Encoder, views: Sequence[Tensor], instead: str) -> None:
    """Refuse, by UserError, views so small that bfloat16 on a CPU gives wrong gradients, see ``one_pixel_strides``.

    Args:
        config: says where and in which precision the encoder is trained.
        encoder: in training mode from here on.
        views: ``(b, 3, S, S)`` each, normalised.
        instead: what may be set beside another precision.
    """
    accelerator, precision = device(config)
    if accelerator != "cpu" or not precision.startswith("bf16"):
        return
    encoder.eval()
    for x in {x.shape[-1]: x for x in views}.values():
        wrong = one_pixel_strides(encoder, lambda x=x: encoder(x[:1]))
        if wrong:
            raise UserError(
                f"views of {x.shape[-1]} pixels reach {wrong[0].removeprefix('net.')} of the encoder as single pixels,"
                " whose gradients torch computes wrongly in bfloat16 on a CPU; set trainer.precision=32-true,"
                f" {instead}"
            )
    encoder.train()


def leave_cores_to_views(accelerator: str, config: DictConfig) -> None:
    """On a CPU, keep torch's threads and the views' within the cores.

    More threads than cores cost far more than they bring: OpenMP's barriers wait for the one that was put to sleep
    (measured on two cores with one of them busy: steps of 0.5 s with one thread, up to 10 s with two).
    """
    if accelerator == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) - (config.data.workers or default_workers()))
        torch.set_num_threads(min(torch.get_num_threads(), threads))
        faiss.omp_set_num_threads(threads)


def resumed(config: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, Path | None]:
    """The configuration of the run to go on with, and its checkpoint; None where it was stopped before its first.

    Without ``resume=`` nothing goes on: ``config`` as it is, and None.

    Raises:
        UserError: if there is no such run, or ``overrides`` would change what it computes.
    """
    if config.resume is None:
        return config, None
    path = Path(config.resume)
    run_dir = path if path.is_dir() else path.parent
    if not path.exists() or not (run_dir / "config.yaml").is_file():
        raise UserError(f"resume={path} is no run: give a run directory, with config.yaml and last.ckpt in it")
    stored = OmegaConf.load(run_dir / "config.yaml")
    typed = [override for override in overrides if not override.startswith("resume=")]
    if typed:
        words = (run_dir / "command.txt").read_text()
        asked = composed([*shlex.split(words)[3:], *typed])
        for key, was, would in differences(stored, asked):
            raise UserError(
                f"resume={path} goes on with a run of {_of(stored)} that has {key}={was}; {key}={would} would be"
                " another run: leave it out, or start anew without resume"
            )
        stored = OmegaConf.merge(asked, {})
    stored.run_dir, stored.resume = str(run_dir), str(path)
    checkpoint = run_dir / "last.ckpt" if path.is_dir() else path
    return stored, checkpoint if checkpoint.is_file() else None


def _of(config: DictConfig) -> str:
    return config.recipe if config.task.name == "pretrain" else config.task.name


def read_checkpoint(path: Path, method: Method, what: str) -> dict:
    """A checkpoint's content, checked against the method that will load it; ``what`` names that to the user.

    Raises:
        UserError: if it is none, holds more than tensors and plain values, or belongs to other weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = state["state_dict"]
    except Exception as error:  # torch.load raises half a dozen kinds on a file that is not its own
        raise UserError(
            f"{path} is no checkpoint of sslzoo, or holds more than tensors and plain values"
            f" ({type(error).__name__}); give a run's last.ckpt"
        ) from error
    own = method.state_dict()
    wrong = [key for key in own if key not in weights or own[key].shape != weights[key].shape]
    wrong += [key for key in weights if key not in own]
    if wrong:
        raise UserError(
            f"{path} does not belong to {what}: {len(wrong)} tensors differ, first {wrong[0]};"
            " resume with the method and encoder it was trained with"
        )
    return state


def refuse_pretraining(overrides: Sequence[str], task: str, instead: str | None = None) -> None:
    """Refuse, by UserError, settings of pretraining that were typed for a task in which they have no meaning.

    Args:
        overrides: what was typed.
        task: its name.
        instead: what to type; None for the same word under ``task``.
    """
    for override in overrides:
        if override.startswith(("optim.", "views=", "views.")):
            raise UserError(f"{override} is pretraining's; for task={task} type {instead or f'task.{override}'}")


def task_images(config: DictConfig, overrides: Sequence[str]) -> Images:
    """The data of a task that trains a backbone further, under ``task.views`` at the size of ``config``.

    Raises:
        UserError: if pretraining's settings were typed, which have no meaning here, or there are several views.
    """
    refuse_pretraining(overrides, config.task.name)
    data = images(with_task_views(config))
    if len(data.views.views) != 1:
        raise UserError(
            f"task.views gives {len(data.views.views)} views of an image; task={config.task.name} needs one"
        )
    return data


def with_task_views(config: DictConfig) -> DictConfig:
    """``config`` with ``task.views``, at its size, in the place of pretraining's views."""
    sized = OmegaConf.merge(config, {})
    sized.views = {
        name: view and {**view, "size": config.image_size} for name, view in plain(config.task.views).items()
    }
    return sized


def fit_batch(data: Images) -> None:
    """Make the batch no larger than the training set: 1 % of the labels may be fewer images than one batch."""
    if data.batch_size > len(data.train):
        data.batch_size = 2 ** int(math.log2(len(data.train)))  # splits over devices
        console.print(f"batches of {data.batch_size}, there are {len(data.train)} training images")


def own_optim(config: DictConfig, data: Images) -> Optim:
    """The optimizer's recipe that ``config.task.optim`` holds."""
    batch_size = data.batch_size * config.trainer.accumulate_grad_batches
    return built(config.task.optim, "task.optim", Optim, batch_size=batch_size)


def started(config: DictConfig, overrides: Sequence[str], labelled: str = "") -> Path:
    """The run's directory, with ``config.yaml``, ``command.txt``, and ``labelled.txt`` where labels are used."""
    if config.resume:
        return Path(config.run_dir)
    run_dir = claim_run_dir(config, config.task.name)
    if not rank_zero_only.rank:
        write_text(run_dir / "command.txt", shlex.join(["python", "-m", "sslzoo", *overrides]) + "\n")
        if labelled:
            write_text(run_dir / "labelled.txt", labelled)
    return run_dir


def tell_skipped(files: Sequence[Path]) -> None:
    """Say which pictures could not be read, where there are any."""
    if files:
        console.print(f"skipped {len(files)} unreadable images, e.g. {', '.join(map(str, files[:3]))}")


def learn(
    module: Downstream | Student,
    data: Images | Mixed,
    config: DictConfig,
    run_dir: Path,
    state: dict | None,
    checkpoint: Path | None,
    every: int = 1,
) -> tuple[pl.Trainer, Metrics, Evaluate]:
    """Train ``module`` and score it on the held-out images every few epochs; ``state`` is the checkpoint's content."""
    on = device(config)
    rows = CsvLog(run_dir / "metrics.csv")
    if config.resume:
        rows.forget_after(state["global_step"] if state else 0)
    metrics = Metrics(config.monitor.log_every)
    evaluate = Evaluate(data.val, data.clean, config.task.name, data.on_error, every)
    bar = Bar(metrics, evaluate, shown=("top-1", f"{config.task.name}_top1"))
    trainer = fit(module, data, config, run_dir, checkpoint, rows, [metrics, evaluate, bar], on)
    return trainer, metrics, evaluate


def images_seen(trainer: pl.Trainer, module: Method, data: Boxes | Images | Mixed) -> int:
    """Images that were learned from; in the burn-in of a moving teacher only those with labels of people."""
    seen = trainer.global_step * data.batch_size * trainer.accumulate_grad_batches
    if not isinstance(module, TaughtStudent):
        return seen
    alone = module.human_alone(trainer.global_step, int(trainer.estimated_stepping_batches))
    return seen - alone * data.batch_size // 2


def effort(trainer: pl.Trainer, data: Images | Mixed, metrics: Metrics, optim: Optim) -> dict:
    """What a summary says of a training: its rate and batch, how it ended, how long it took."""
    return {
        "lr": optim.peak_lr,
        "batch_size": data.batch_size,
        "loss": metrics.loss,
        "steps": trainer.global_step,
        "epochs": data.loader.position / len(data.loader),
        "seconds": metrics.seconds,
    }
