"""Train a method on unlabelled images, and leave a backbone."""

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import faiss
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from rich.table import Table

from sslzoo.checkpoints.backbone import save_backbone
from sslzoo.checkpoints.files import write_text
from sslzoo.config import build_encoder, build_optim, built, composed, config_hash, differences, plain
from sslzoo.data.images import ImageSet
from sslzoo.data.module import default_workers
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import Checkpoint, Metrics, Probe, Stopped, Watch, device_memory_mb, shape
from sslzoo.report.csv_log import CsvLog
from sslzoo.report.pictures import curves, neighbour_strips
from sslzoo.report.progress import Bar, console
from sslzoo.tasks.runs import claim_run_dir, device, images, more_loggers, provenance, write_summary

log = logging.getLogger(__name__)


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train ``config.method`` and leave a run directory: config, metrics, curves, checkpoint, backbone, summary."""
    checkpoint = None
    if config.resume is not None:
        config, checkpoint = resumed(config, overrides)
    pl.seed_everything(config.seed, verbose=False)
    data = images(config)
    method = build_method(config, data.train)
    accelerator, precision = device(config)
    leave_cores_to_views(accelerator, config)
    state = read_checkpoint(checkpoint, method, config) if checkpoint else None
    run_dir = Path(config.run_dir) if config.resume else claim_run_dir(config, config.recipe)
    if not config.resume and not rank_zero_only.rank:
        write_text(run_dir / "command.txt", shlex.join(["python", "-m", "sslzoo", *overrides]) + "\n")
    console.print(f"{config.recipe} on {data.train.name}: {len(data.train)} images, {precision}, {run_dir}")

    metrics = Metrics(config.monitor.log_every)
    probe = Probe(data, config.monitor.k, config.monitor.temperature, config.monitor.bank, config.monitor.queries)
    watch = Watch(probe, metrics, config.monitor.every_epochs, config.monitor.doctor)
    raw = probe.knn(*probe.pixels())
    before = probe.features(method.backbone)
    random_init = probe.knn(*before)

    rows = CsvLog(run_dir / "metrics.csv")
    if config.resume:
        rows.forget_after(state["global_step"] if state else 0)
    trainer = pl.Trainer(
        accelerator=accelerator,
        precision=precision,
        logger=[rows, *more_loggers(config, run_dir)],
        callbacks=[metrics, watch, Bar(metrics, watch), Checkpoint(run_dir, **config.checkpoint)],
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
    if not trainer.is_global_zero:
        return {}

    after = probe.features(method.backbone)
    backbone = save_backbone(
        method.backbone,
        run_dir / "backbone.safetensors",
        method=config.recipe,
        mean=list(config.data.mean),
        std=list(config.data.std),
        image_size=config.image_size,
        config_hash=config_hash(config),
    )
    skipped = data.loader.reader.skipped if data.loader else set()
    summary = {
        "task": "pretrain",
        "method": config.recipe,
        "data": data.train.name,
        "steps": trainer.global_step,
        "epochs": data.loader.position / len(data.loader),
        "seconds": metrics.seconds,
        "images_per_second": metrics.images / metrics.seconds,
        "loss": metrics.loss,
        "knn_top1": probe.knn(*after),
        "knn_top1_raw_pixels": raw,
        "knn_top1_random_init": random_init,
        "knn_k": config.monitor.k,
        "knn_temperature": config.monitor.temperature,
        **shape(after[0]),
        "peak_memory_mb": device_memory_mb(trainer.strategy.root_device),
        "backbone": str(backbone),
        "precision": precision,
        "world_size": trainer.world_size,
        "skipped_images": len(skipped),
        **provenance(config, overrides),
    }
    title = f"{config.recipe} on {data.train.name}, seed {config.seed}"
    curves(rows.rows, run_dir / "curves.png", title, raw, random_init)
    if len(after[1]):
        strips = {"random init": before[::-1], "pretrained": after[::-1]}
        sets = (data.val, probe.query_rows), (data.train, probe.bank_rows)
        neighbour_strips(run_dir / "neighbours.png", *sets, strips)
    write_summary(run_dir, summary)
    if skipped:
        names = ", ".join(str(data.train.files[row]) for row in sorted(skipped)[:3])
        console.print(f"skipped {len(skipped)} unreadable images, e.g. {names}")
    report(summary, run_dir)
    return summary


def build_method(config: DictConfig, train: ImageSet) -> Method:
    """The method that ``config.method`` describes, checked against the data it will see."""
    settings = plain(config.method)
    check_sizes(settings, config.data.batch_size, train)
    if "size" in settings:
        settings["size"] = len(train)
    method = built(OmegaConf.create(settings), "method", encoder=build_encoder(config), optim=build_optim(config))
    method.seed = config.seed
    method.check(config.data.batch_size)
    if config.trainer.accumulate_grad_batches > 1 and not method.accumulates:
        raise UserError(
            f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches} would train another method:"
            " images of one batch are contrasted or normalised together; set it to 1 and choose data.batch_size"
        )
    return method


def check_sizes(settings: dict, batch_size: int, train: ImageSet) -> None:
    """Refuse a batch or queue larger than the set (several keys of one image), and a bank of another size."""
    if not 0 < batch_size <= len(train):
        raise UserError(
            f"data.batch_size={batch_size} is larger than {train.name} with its {len(train)} training images;"
            f" set data.batch_size to at most {len(train)}"
        )
    queue, bank = settings.get("queue_size") or 0, settings.get("size") or len(train)
    if queue > len(train):
        raise UserError(
            f"queue_size is {queue} but {train.name} has {len(train)} training images;"
            f" set method.queue_size to at most {len(train)}"
        )
    if bank != len(train):
        raise UserError(
            f"method.size={bank} but {train.name} has {len(train)} training images, and the bank has a slot for each;"
            " leave method.size=null"
        )


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

    Raises:
        UserError: if there is no such run, or ``overrides`` would change what it computes.
    """
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
                f"resume={path} goes on with a run of {stored.recipe} that has {key}={was}; {key}={would} would be"
                " another run: leave it out, or start anew without resume"
            )
        stored = OmegaConf.merge(asked, {})
    stored.run_dir, stored.resume = str(run_dir), str(path)
    checkpoint = run_dir / "last.ckpt" if path.is_dir() else path
    return stored, checkpoint if checkpoint.is_file() else None


def read_checkpoint(path: Path, method: Method, config: DictConfig) -> dict:
    """A checkpoint's content, checked against the method that will load it.

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
            f"{path} does not belong to {config.recipe} with encoder.name={config.encoder.name}: {len(wrong)} tensors"
            f" differ, first {wrong[0]}; resume with the method and encoder it was trained with"
        )
    return state


def report(summary: dict, run_dir: Path) -> None:
    """The small table a pretraining run ends with."""
    k, temperature = summary["knn_k"], summary["knn_temperature"]
    table = Table(title=f"{summary['method']} on {summary['data']}, seed {summary['seed']}")
    table.add_column("")
    table.add_column(f"kNN top-1 (k={k}, T={temperature})", justify="right")
    for name, key in (("raw pixels", "_raw_pixels"), ("random init", "_random_init"), ("pretrained", "")):
        value = summary[f"knn_top1{key}"]
        table.add_row(name, "-" if value is None else f"{100 * value:.1f} %")
    console.print(table)
    console.print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['images_per_second']:.0f} images/s,"
        f" peak {summary['peak_memory_mb']:.0f} MB"
    )
    written = ", ".join(sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".")))
    console.print(f"{run_dir}: {written}")
