"""The verbs: each takes the configuration and what was typed, and returns a dict of scores."""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import faiss
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from rich.table import Table

from sslzoo import __version__
from sslzoo.checkpoints.backbone import load_backbone, save_backbone
from sslzoo.checkpoints.files import write_text
from sslzoo.config import build_encoder, build_optim, built, composed, config_hash, differences, plain
from sslzoo.data.images import ImageSet, load
from sslzoo.data.module import Images, default_workers
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import Checkpoint, Metrics, Probe, Stopped, Watch, device_memory_mb, shape
from sslzoo.report.csv_log import CsvLog
from sslzoo.report.pictures import curves, neighbour_strips
from sslzoo.report.progress import Bar, console
from sslzoo.views import Clean, Views, parse

log = logging.getLogger(__name__)


def pretrain(config: DictConfig, overrides: Sequence[str]) -> dict:
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


def knn(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Weighted nearest-neighbour accuracy of ``config.backbone`` on ``config.data``."""
    if config.backbone is None:
        raise UserError("task=knn needs backbone=: a run's backbone.safetensors, random, or timm/NAME")
    pl.seed_everything(config.seed, verbose=False)
    encoder = load_backbone(config.backbone, config.pretrained, plain(config.encoder))
    config = OmegaConf.merge(config, {"image_size": encoder.metadata.get("image_size", config.image_size)})
    for key in ("mean", "std"):
        config.data[key] = encoder.metadata.get(key, config.data[key])
    data = images(config)
    encoder.to("cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu")
    probe = Probe(data, config.task.k, config.task.temperature, len(data.train), len(data.val) if data.val else 0)
    if not probe.labelled:
        raise UserError(f"task=knn needs labelled training and held-out images; {data.train.name} has none")
    run_dir = claim_run_dir(config, "knn")
    began = time.perf_counter()
    after = probe.features(encoder)
    summary = {
        "task": "knn",
        "method": encoder.metadata["method"],
        "data": data.train.name,
        "knn_top1": probe.knn(*after),
        "knn_k": config.task.k,
        "knn_temperature": config.task.temperature,
        **shape(after[0]),
        "seconds": time.perf_counter() - began,
        "backbone": str(config.backbone),
        "pretrained": encoder.metadata.get("pretrained", config.backbone != "random"),
        **provenance(config, overrides),
    }
    write_summary(run_dir, summary)
    console.print(
        f"kNN top-1 {100 * summary['knn_top1']:.2f} % (k={config.task.k}, T={config.task.temperature},"
        f" {len(after[1])} held-out images of {data.train.name}) -> {run_dir}/summary.json"
    )
    return summary


TASKS: dict[str, Callable[[DictConfig, Sequence[str]], dict]] = {"pretrain": pretrain, "knn": knn}


def images(config: DictConfig) -> Images:
    """The data that ``config.data``, ``config.views`` and the sizes describe."""
    settings = plain(config.data)
    mean, std = settings.pop("mean"), settings.pop("std")
    batch_size, workers = settings.pop("batch_size"), settings.pop("workers")
    train, val = load(**settings)
    views = Views(parse(plain(config.views)), mean, std, seed=config.seed)
    return Images(
        train,
        val,
        views,
        Clean(config.image_size, mean, std),
        batch_size,
        seed=config.seed,
        workers=workers,
        on_error=settings["on_error"],
    )


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


ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


def device(config: DictConfig) -> tuple[str, str]:
    """Accelerator and precision; ``auto`` is bfloat16 where the hardware computes in it."""
    wanted = config.trainer.accelerator
    for key, allowed in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
        if str(config.trainer[key]) not in allowed:
            raise UserError(f"trainer.{key}={config.trainer[key]} is none of {', '.join(allowed)}")
    on_gpu = torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda")
    accelerator = "cuda" if on_gpu else "cpu" if wanted == "auto" else wanted
    if config.trainer.precision != "auto":
        return accelerator, str(config.trainer.precision)
    bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return accelerator, "bf16-mixed" if bf16 else "32-true"


def leave_cores_to_views(accelerator: str, config: DictConfig) -> None:
    """On a CPU, keep torch's threads and the views' within the cores.

    More threads than cores cost far more than they bring: OpenMP's barriers wait for the one that was put to sleep
    (measured on two cores with one of them busy: steps of 0.5 s with one thread, up to 10 s with two).
    """
    if accelerator == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) - (config.data.workers or default_workers()))
        torch.set_num_threads(min(torch.get_num_threads(), threads))
        faiss.omp_set_num_threads(threads)


def more_loggers(config: DictConfig, run_dir: Path) -> list:
    """What ``logger=`` adds to metrics.csv."""
    settings = plain(config.logger)
    name = settings.pop("name")
    if name == "tensorboard":
        try:
            return [pl.loggers.TensorBoardLogger(run_dir, name="", version="", **settings)]
        except ModuleNotFoundError as error:
            raise UserError('logger=tensorboard needs a package: pip install "sslzoo[tensorboard]"') from error
    if name == "wandb":
        return [pl.loggers.WandbLogger(save_dir=run_dir, config=plain(config), **settings)]
    return []


def claim_run_dir(config: DictConfig, name: str) -> Path:
    """A directory of this run's own.

    Raises:
        UserError: if ``run_dir`` holds a run already or cannot be written.
    """
    run_dir = Path(config.run_dir or Path("runs") / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if rank_zero_only.rank:  # rank 0 claims it, the others write nothing
        return run_dir
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"run_dir={run_dir} exists and is not empty; name another, or go on with resume={run_dir}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(config))
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: {error.strerror}; name another") from error
    return run_dir


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


def provenance(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Where a number comes from: seed, config hash, versions, command."""
    packages = ("torch", "pytorch-lightning", "timm")
    return {
        "seed": config.seed,
        "config_hash": config_hash(config),
        "versions": {
            "sslzoo": __version__,
            **{name: version(name) for name in packages},
            "python": sys.version.split()[0],
        },
        "command": shlex.join(["python", "-m", "sslzoo", *overrides]),
    }


def write_summary(run_dir: Path, summary: dict) -> None:
    """``summary.json``, whole."""
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


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
