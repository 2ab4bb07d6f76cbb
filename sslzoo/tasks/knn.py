"""Weighted nearest neighbours of the held-out images among the training images."""

import time
from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig
from rich.table import Table

from sslzoo.downstream.cache import Cache, cache_folder, weights_hash
from sslzoo.downstream.features import check_size, unit, unit_parts
from sslzoo.downstream.interval import interval
from sslzoo.downstream.knn import ranks
from sslzoo.downstream.labels import labelled_images
from sslzoo.downstream.search import neighbours
from sslzoo.errors import UserError
from sslzoo.monitor import shape
from sslzoo.report.progress import console
from sslzoo.tasks.runs import backbone_and_config, claim_run_dir, images, provenance, write_summary


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Weighted nearest-neighbour accuracy of ``config.backbone`` on ``config.data``, and its grid over k and T."""
    pl.seed_everything(config.seed, verbose=False)
    encoder, config = backbone_and_config(config)
    data, task = images(config), config.task
    train, val = labelled_images(
        "knn", data.train, data.val, config.data.label_fraction, config.data.label_list, config.seed
    )
    ks, temperatures = grid_of(task, len(train), train.name)
    check_size(encoder, config.image_size)
    cache = Cache(cache_folder(task.cache), task.cache_limit_mb)
    run_dir = claim_run_dir(config, "knn")
    began = time.perf_counter()
    bank, bank_rows = cache.features(encoder, train, data.clean, on_error=data.on_error)
    asked, asked_rows = cache.features(encoder, val, data.clean, on_error=data.on_error)
    grid = vote(bank["last"], train.labels[bank_rows], asked["last"], val.labels[asked_rows], ks, temperatures)
    headline = grid[task.k, task.temperature]
    summary = {
        "task": "knn",
        "method": encoder.metadata["method"],
        "data": train.name,
        "knn_top1": float((headline < 1).mean()),
        "knn_top5": float((headline < 5).mean()),
        "knn_top1_interval": list(interval(headline < 1)),
        "knn_k": task.k,
        "knn_temperature": task.temperature,
        "knn_grid": {f"k={k},T={t:g}": float((places < 1).mean()) for (k, t), places in grid.items()},
        **shape(unit(bank["last"][:65536])),
        "seconds": time.perf_counter() - began,
        "backbone": str(config.backbone),
        "weights": weights_hash(encoder),
        "pretrained": encoder.metadata.get("pretrained", config.backbone != "random"),
        **provenance(config, overrides),
    }
    write_summary(run_dir, summary)
    low, high = summary["knn_top1_interval"]
    console.print(grid_table(summary, ks, temperatures))
    console.print(
        f"kNN top-1 {100 * summary['knn_top1']:.2f} % [{100 * low:.2f}, {100 * high:.2f}] (k={task.k},"
        f" T={task.temperature:g}, {len(asked_rows)} held-out images of {train.name}) -> {run_dir}/summary.json",
        markup=False,
    )
    return summary


def grid_of(task: DictConfig, bank: int, name: str) -> tuple[list[int], list[float]]:
    """The k and temperatures to report, ascending, the headline's among them; k beyond the bank are left out.

    Raises:
        UserError: if the headline's own k or temperature cannot be.
    """
    if not 1 <= task.k <= bank:
        raise UserError(
            f"task.k={task.k} neighbours cannot be asked of the {bank} labelled training images of {name};"
            f" set task.k to 1 ... {bank}"
        )
    ks, temperatures = sorted({task.k, *task.grid_k}), sorted({task.temperature, *task.grid_temperature})
    if ks[0] < 1 or temperatures[0] <= 0:
        raise UserError(f"task.grid_k={ks} and task.grid_temperature={temperatures} must be above 0")
    return [k for k in ks if k <= bank], temperatures


def vote(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> dict[tuple[int, float], np.ndarray]:
    """Where the true class comes in each vote, ``{(k, T): (M,)}``, from one search; features of any length."""
    similarity, rows = neighbours(unit_parts(bank), unit(queries), max(ks))
    places = ranks(similarity, bank_labels[rows], query_labels, ks, temperatures)
    return {(k, t): places[i, j] for i, k in enumerate(ks) for j, t in enumerate(temperatures)}


def grid_table(summary: dict, ks: Sequence[int], temperatures: Sequence[float]) -> Table:
    """kNN top-1 in % over k and temperature; the headline is marked."""
    table = Table("k", *(f"T={t:g}" for t in temperatures), title="kNN top-1, %")
    for k in ks:
        marks = ["*" if (k, t) == (summary["knn_k"], summary["knn_temperature"]) else "" for t in temperatures]
        values = [100 * summary["knn_grid"][f"k={k},T={t:g}"] for t in temperatures]
        table.add_row(str(k), *(f"{value:.2f}{mark}" for value, mark in zip(values, marks, strict=True)))
    return table
