"""Train a method on unlabelled images, and leave a backbone."""

import logging
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from rich.table import Table
from torch import Tensor

from sslzoo.blocks.crops import check_count
from sslzoo.checkpoints.backbone import save_backbone
from sslzoo.checkpoints.files import write_text
from sslzoo.config import build_encoder, build_optim, built, config_hash, plain
from sslzoo.data.images import ImageSet
from sslzoo.data.module import Images, Reader, default_workers, epoch_order
from sslzoo.downstream.features import check_size
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import Metrics, Probe, Watch, device_memory_mb, shape
from sslzoo.report.csv_log import CsvLog
from sslzoo.report.pictures import curves, neighbour_strips
from sslzoo.report.progress import Bar, console
from sslzoo.tasks.runs import claim_run_dir, device, images, provenance, write_summary
from sslzoo.tasks.training import check_strides, fit, leave_cores_to_views, read_checkpoint, resumed

log = logging.getLogger(__name__)


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train ``config.method`` and leave a run directory: config, metrics, curves, checkpoint, backbone, summary."""
    config, checkpoint = resumed(config, overrides)
    pl.seed_everything(config.seed, verbose=False)
    data = images(config)
    method = build_method(config, data.train)
    check_count(data.views.count, f"method={config.recipe}", method.compares_views)
    check_size(method.backbone, config.image_size)
    method.train()  # after a look in eval mode
    views = first_views(data)
    method.check_views(views)
    check_strides(config, method.encoder, views, "larger image_size and local_size, or encoder.stem=small")
    accelerator, precision = device(config)
    leave_cores_to_views(accelerator, config)
    named = f"{config.recipe} with encoder.name={config.encoder.name}"
    state = read_checkpoint(checkpoint, method, named) if checkpoint else None
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
    callbacks = [metrics, watch, Bar(metrics, watch)]
    trainer = fit(method, data, config, run_dir, checkpoint, rows, callbacks, (accelerator, precision))
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
        projector=method.kept_projector,
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


def first_views(data: Images, count: int = 64) -> list[Tensor]:
    """Views of the first images that the run will see, to check before it starts: ``V x (b, 3, H_v, W_v)``."""
    rows = epoch_order(data.seed, 0, len(data.train))[:count]
    with ThreadPoolExecutor(default_workers()) as pool:
        read, rows = Reader(data.train, pool, data.on_error)(rows)
        return data.views(read, rows, 0, pool=pool)


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
