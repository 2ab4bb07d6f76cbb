"""What the tasks share that train a network on the backbone's maps: detection, segmentation, keypoints."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from sslzoo.blocks import Encoder
from sslzoo.data.box_module import Boxes
from sslzoo.data.box_set import BoxSet
from sslzoo.data.maps import MapSet
from sslzoo.data.mixed import Mixed
from sslzoo.data.point_sets import PointSet
from sslzoo.data.readable import Held, readable
from sslzoo.downstream.evaluate import Evaluate
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import Metrics, device_memory_mb
from sslzoo.report.csv_log import CsvLog
from sslzoo.report.progress import Bar, console
from sslzoo.tasks.runs import device
from sslzoo.tasks.training import fit, images_seen, leave_cores_to_views, read_checkpoint, started, tell_skipped


class Training(NamedTuple):
    """One that has ended.

    Attributes:
        run_dir: where it left its files.
        rows: what was logged along it.
        precision: in which it computed.
    """

    run_dir: Path
    trainer: pl.Trainer
    metrics: Metrics
    rows: CsvLog
    precision: str


def train(
    module: Method,
    data: Boxes | Mixed,
    images: str,
    evaluate: Evaluate,
    shown: tuple[str, str],
    config: DictConfig,
    overrides: Sequence[str],
    checkpoint: Path | None,
) -> Training:
    """Train ``module`` as ``config`` says, in a directory of its own or on from ``checkpoint``.

    Args:
        images: what is learned from, as the user is told.
        evaluate: scores the held-out images along the way.
        shown: the score that progress shows: its name there, and in ``evaluate.values``.

    Raises:
        UserError: if the checkpoint is another module's.
    """
    on = device(config)
    leave_cores_to_views(on[0], config)
    model, backbone = config.task.model, config.backbone
    state = read_checkpoint(checkpoint, module, f"task.model={model} on backbone={backbone}") if checkpoint else None
    run_dir = started(config, overrides)
    console.print(f"{model} on {backbone}: {images}, {on[1]}, {run_dir}")
    rows = CsvLog(run_dir / "metrics.csv")
    if config.resume:
        rows.forget_after(state["global_step"] if state else 0)
    metrics = Metrics(config.monitor.log_every)
    callbacks = [metrics, evaluate, Bar(metrics, evaluate, shown=shown)]
    trainer = fit(module, data, config, run_dir, checkpoint, rows, callbacks, on)
    module.to(trainer.strategy.root_device)  # the trainer has taken it from there
    return Training(run_dir, trainer, metrics, rows, on[1])


def effort(training: Training, module: Method, data: Boxes | Mixed) -> dict:
    """What a summary says of a training's length, speed and cost; ``module`` is what took the batches of ``data``."""
    trainer, metrics = training.trainer, training.metrics
    return {
        "loss": metrics.loss,
        "steps": trainer.global_step,
        "epochs": data.loader.position / len(data.loader),
        "seconds": metrics.seconds,
        "images_seen": images_seen(trainer, module, data),
        "images_per_second": metrics.images / metrics.seconds if metrics.seconds else None,
        "peak_memory_mb": device_memory_mb(trainer.strategy.root_device),
        "precision": training.precision,
        "world_size": trainer.world_size,
        "skipped_images": len(data.skipped),
    }


Examples = BoxSet | MapSet | PointSet


def origin(config: DictConfig, encoder: Encoder, train: Examples, val: Examples) -> dict:
    """What a summary says of the backbone and the images that it was trained and scored on."""
    return {
        "backbone": str(config.backbone),
        "pretrained": encoder.metadata.get("pretrained", config.backbone != "random"),
        "train_images": len(train),
        "val_images": len(val),
        "skipped": {name: int(count) for name, count in (train.skipped + val.skipped).items()},
    }


def held_out(images: Held, on_error: str, read: Callable[[int], object] | None = None) -> Held:
    """The held-out images that can be read, see ``readable``; what is left out is said once."""
    kept, files = readable(images, on_error, read)
    if not rank_zero_only.rank:
        tell_skipped(files)
    return kept


def leave_out_unused(
    encoder: Encoder,
    forward: Callable[[Tensor], Iterable[Tensor]],
    side: int,
    backbone: str,
    setting: str,
    others: Iterable[nn.Parameter] = (),
) -> None:
    """Train no weight of ``encoder`` that ``forward`` does not need: ranks would wait for its gradient.

    A ViT's last norm, for one, comes after its maps.

    Args:
        encoder: the backbone.
        forward: from an image ``(1, 3, side, side)`` to what is learned from, in eval mode.
        side: of the images in pixels.
        backbone, setting: what the user typed for the encoder, and the name of what ``side`` comes from.
        others: weights that are needed all the same.

    Raises:
        UserError: if the encoder cannot see such images.
    """
    weight = next(encoder.parameters())
    try:
        outputs = forward(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
    except (AssertionError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        says = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"backbone={backbone} gives no maps of images of {side} pixels ({says}); take another backbone or {setting}"
        ) from error
    kept = {id(p) for p in others}
    weights = [p for p in encoder.parameters() if p.requires_grad and id(p) not in kept]
    total = torch.stack([output.sum() for output in outputs]).sum()
    for p, gradient in zip(weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
        p.requires_grad_(gradient is not None)
