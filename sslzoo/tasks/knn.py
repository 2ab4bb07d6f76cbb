"""Weighted nearest neighbours of the held-out images among the training images."""

import time
from collections.abc import Sequence

import pytorch_lightning as pl
from omegaconf import DictConfig

from sslzoo.errors import UserError
from sslzoo.monitor import Probe, shape
from sslzoo.report.progress import console
from sslzoo.tasks.runs import backbone_and_config, claim_run_dir, images, provenance, write_summary


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Weighted nearest-neighbour accuracy of ``config.backbone`` on ``config.data``."""
    pl.seed_everything(config.seed, verbose=False)
    encoder, config = backbone_and_config(config)
    data = images(config)
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
