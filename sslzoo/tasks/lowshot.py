"""Linear SVMs on frozen features, with a few labelled images of each class and with all."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig
from rich.table import Table

from sslzoo.blocks import Encoder
from sslzoo.data.images import ImageSet
from sslzoo.downstream.features import check_size, features
from sslzoo.downstream.interval import interval
from sslzoo.downstream.labels import labelled_rows
from sslzoo.downstream.lowshot import FOLDS, ONE_SHOT_COST, decide, learn, lowshot, one_of
from sslzoo.errors import UserError
from sslzoo.report.progress import console
from sslzoo.tasks.runs import backbone_and_config, claim_run_dir, images, provenance, write_summary
from sslzoo.views import Clean


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Accuracy of linear SVMs on ``config.backbone``'s features of ``config.data``, for each k and with all labels."""
    pl.seed_everything(config.seed, verbose=False)
    encoder, config = backbone_and_config(config)
    check_size(encoder, config.image_size)
    data, task = images(config), config.task
    rows = labelled_rows("lowshot", data.train, data.val)
    known = np.unique(data.train.labels[rows[0]])
    least = int(np.bincount(data.train.labels[rows[0]])[known].min())
    check_settings(task, least)
    run_dir = claim_run_dir(config, "lowshot")
    console.print(f"lowshot {config.backbone} on {data.train.name}, {run_dir}")
    began = time.perf_counter()
    train, val = (
        labelled_features(encoder, split, data.clean, of_split, known, data.on_error)
        for split, of_split in zip((data.train, data.val), rows, strict=True)
    )
    costs = tuple(task.costs)
    table = lowshot(train, val, list(task.shots), task.samples, costs, config.seed)
    weights, chosen = learn(*train, costs)
    right = decide(weights, val[0]).argmax(1) == val[1].argmax(1)
    summary = {
        "task": "lowshot",
        "method": encoder.metadata["method"],
        "data": data.train.name,
        "lowshot": {str(k): scores for k, scores in table.items()},
        "lowshot_left_out": [k for k in task.shots if k not in table],
        "lowshot_samples": task.samples,
        "lowshot_top1": float(right.mean()),
        "lowshot_top1_interval": list(interval(right)),
        "lowshot_cost": float(chosen[0]),
        "seconds": time.perf_counter() - began,
        "backbone": str(config.backbone),
        "pretrained": encoder.metadata.get("pretrained", config.backbone != "random"),
        **provenance(config, overrides),
    }
    write_summary(run_dir, summary)
    report(summary, least, len(train[0]), run_dir)
    if len(costs) > 1 and summary["lowshot_cost"] == max(costs):
        console.print("the largest of task.costs was chosen: larger ones may do better still")
    return summary


def check_settings(task: DictConfig, least: int) -> None:
    """Refuse numbers of images, draws and costs that cannot be, ``least`` being the size of the smallest class."""
    if not task.shots or min(task.shots) < 1:
        raise UserError(f"task.shots={list(task.shots)} are no numbers of images; give e.g. [1,8,64]")
    if min(task.shots) > least:
        raise UserError(f"task.shots={list(task.shots)} are all more than the {least} images of the smallest class")
    if task.samples < 1:
        raise UserError(f"task.samples={task.samples} draws nothing; give at least 1")
    if not task.costs or min(task.costs) <= 0:
        raise UserError(f"task.costs={list(task.costs)} are no costs; give numbers above 0")
    if len(task.costs) > 1 and least < FOLDS:
        raise UserError(
            f"the smallest class has {least} training images, too few to choose among {len(task.costs)} costs by"
            f" {FOLDS} folds; set task.costs=[{ONE_SHOT_COST}]"
        )


def labelled_features(
    encoder: Encoder, split: ImageSet, clean: Clean, rows: np.ndarray, known: np.ndarray, on_error: str
) -> tuple[np.ndarray, np.ndarray]:
    """Features ``(n, D)`` of ``rows``, and their labels ``(n, C)`` in the order of the classes ``known`` (C,)."""
    z, read = features(encoder, split, clean, rows, on_error=on_error)
    return z, one_of(np.searchsorted(known, split.labels[read]), len(known))


def report(summary: dict, least: int, images: int, run_dir: Path) -> None:
    """The table a low-shot evaluation ends with."""
    table = Table(title=f"linear SVMs on {summary['method']}, {summary['data']}")
    table.add_column("images a class", justify="right")
    table.add_column(f"top-1, {summary['lowshot_samples']} draws", justify="right")
    for k, found in summary["lowshot"].items():
        spread = "" if found["sd"] is None else f" ± {100 * found['sd']:.1f}"
        table.add_row(k, f"{100 * found['mean']:.1f}{spread} %")
    table.add_row(f"all {images}", f"{100 * summary['lowshot_top1']:.1f} %")
    console.print(table)
    if summary["lowshot_left_out"]:
        left_out = ", ".join(str(k) for k in summary["lowshot_left_out"])
        console.print(f"left out: {left_out} images a class, for the smallest class has {least}")
    console.print(f"cost {summary['lowshot_cost']:g}, {summary['seconds']:.0f} s -> {run_dir}/summary.json")
