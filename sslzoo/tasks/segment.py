"""Train a segmenter on a backbone, and score its class maps of held-out images."""

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, ListConfig, OmegaConf

from sslzoo.blocks import Encoder
from sslzoo.config import built, plain
from sslzoo.data.box_module import Boxes
from sslzoo.data.box_views import STRENGTHS
from sslzoo.data.map_module import map_example, map_twin_example
from sslzoo.data.maps import MapSet, load_maps, load_unlabelled_maps
from sslzoo.data.mixed import Mixed
from sslzoo.data.pseudo_maps import PseudoMaps
from sslzoo.downstream import segmenters
from sslzoo.downstream.evaluate import Evaluate
from sslzoo.downstream.segmentation import Segmentation, drawn, looked
from sslzoo.downstream.segmenters import Segmenter
from sslzoo.downstream.taught import TaughtSegmentation
from sslzoo.errors import UserError
from sslzoo.moving_teacher import Moving
from sslzoo.optim import Optim
from sslzoo.report.class_maps import curves, predictions, some_rows, write_maps
from sslzoo.report.progress import console
from sslzoo.selftrain import LossBalance, Student, fingerprint
from sslzoo.tasks import dense
from sslzoo.tasks.dense import held_out, leave_out_unused
from sslzoo.tasks.runs import backbone_and_config, device, provenance, write_summary
from sslzoo.tasks.training import (
    refuse_pretraining,
    resumed,
    tell_skipped,
)

BUILT = ("channels", "norm", "repeats")  # what build's arguments are called in conf/task/segment.yaml: the same


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train ``config.task.model`` on ``config.backbone``; leave its scores, curves, and class maps."""
    checkpoint = None
    if config.resume is not None:
        config, checkpoint = resumed(config, overrides)
    check(config, overrides)
    task = config.task
    pl.seed_everything(config.seed, verbose=False)
    encoder, sized = backbone_and_config(OmegaConf.merge(config, {}))
    pl.seed_everything(config.seed, verbose=False)  # heads start alike, whatever the backbone
    train, val = load_sets(config)
    data = batches(config, train, val)
    optim = built(task.optim, "task.optim", Optim, batch_size=data.batch_size)
    module = learner = build_learner(sized, encoder, len(train.map_classes), optim)
    start = fingerprint(learner)
    if task.teacher is not None:
        data, module = taught(config, learner, data)
    elif task.pseudo is not None:
        labelled = PseudoMaps.read(task.pseudo, load_unlabelled_maps(plain(config.data), config.seed))
        others = OmegaConf.merge(config, {"seed": config.seed + 1})  # an order and views of their own
        data = Mixed(data, batches(others, labelled, val))
        module = Student(learner, LossBalance(task.alpha))
    inference = {"scales": list(task.scales), "flip": task.flip}
    evaluate = Evaluate(lambda _: looked(learner, val, **inference), task.every_epochs)
    images = f"{len(train)} images of {train.name}"
    training = dense.train(module, data, images, evaluate, ("mIoU", "miou"), config, overrides, checkpoint)
    run_dir, trainer = training.run_dir, training.trainer
    if not trainer.is_global_zero:
        return {}

    title = f"{task.model} on {encoder.metadata['method']}, {train.name}, seed {config.seed}"
    curves(training.rows.rows, run_dir / "curves.png", title)
    if task.save_maps:
        write_maps(run_dir / "maps", val, drawn(learner, val, range(len(val)), **inference))
    shown = some_rows(val)
    predictions(run_dir / "predictions.png", val, shown, list(drawn(learner, val, shown, **inference)), title)
    summary = {
        "task": "segment",
        "method": encoder.metadata["method"],
        "data": train.name,
        "model": task.model,
        **evaluate.values,
        "classes": len(train.map_classes),
        "start": start,
        "teacher": None if task.teacher is None else module.told(),
        **dense.effort(training, module, data),
        **dense.origin(config, encoder, train, val),
        **provenance(config, overrides),
    }
    write_summary(run_dir, summary)
    tell_skipped(data.skipped)
    report(summary, run_dir)
    return summary


def check(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse, by UserError, settings that mean nothing here."""
    task = config.task
    refuse_pretraining(overrides, "segment", "task.optim.* or task.augment")
    if config.data.label_list is not None:
        raise UserError("data.label_list names images to classify; for task=segment set data.label_fraction instead")
    if config.trainer.accumulate_grad_batches != 1:
        raise UserError("task=segment does not accumulate gradients: set trainer.accumulate_grad_batches=1")
    check_scales("task.scales", task.scales)
    Moving.asked(task.teacher, task.pseudo)
    built(task.optim, "task.optim", Optim, batch_size=config.data.batch_size)
    device(config)
    pooled = task.model == "deeplabv3" or (task.model == "nas_fpn" and task.norm == "batch")
    if pooled and config.data.batch_size < 2:
        raise UserError(
            f"data.batch_size={config.data.batch_size} leaves task.model={task.model} with BatchNorms of one value;"
            " set data.batch_size to 2 or more"
        )


def check_scales(name: str, scales: object) -> None:
    """Refuse, by UserError, what is no list of scales to look at an image in."""
    listed = list(scales) if isinstance(scales, ListConfig) else []
    if not listed or not all(isinstance(scale, int | float) and 0 < scale <= 8 for scale in listed):
        raise UserError(f"{name}={scales} are no scales; list one or more above 0 and up to 8")


def load_sets(config: DictConfig) -> tuple[MapSet, MapSet]:
    """The training images and the held-out ones that can be read.

    Raises:
        UserError: if these data have no class maps.
    """
    train, every = load_maps(plain(config.data), config.seed)
    return train, held_out(every, config.data.on_error, lambda i: (every.picture(i), every.class_map(i)))


def batches(config: DictConfig, train: MapSet, val: MapSet) -> Boxes:
    """Batches of ``train`` as ``config`` asks for them."""
    task, data = config.task, config.data
    example = map_example(train, task.augment, task.size, config.seed)
    return Boxes(train, val, example, data.batch_size, seed=config.seed, workers=data.workers, on_error=data.on_error)


def taught(config: DictConfig, learner: Segmentation, human: Boxes) -> tuple[Mixed, TaughtSegmentation]:
    """Batches of ``human`` and of all images that have a map in ``task.pseudo``, and who learns from them."""
    task, moving = config.task, Moving.asked(config.task.teacher, config.task.pseudo)
    images = PseudoMaps.read(task.pseudo, load_unlabelled_maps(plain(config.data), config.seed)).images
    seed = config.seed + 1  # an order and views of their own
    example = map_twin_example(images, task.augment, task.size, seed)
    pseudo = Boxes(images, human.val, example, human.batch_size, seed, human.workers, human.on_error)
    return Mixed(human, pseudo), TaughtSegmentation(learner, LossBalance(task.alpha), moving)


def build_learner(config: DictConfig, encoder: Encoder, classes: int, optim: Optim | None = None) -> Segmentation:
    """What learns: ``config.task.model`` on ``encoder``, see ``build_segmenter``."""
    task = config.task
    segmenter = build_segmenter(config, encoder, classes)
    learner = Segmentation(segmenter, optim, task.clip, task.size if STRENGTHS[task.augment].of_crop else None)
    learner.seed = config.seed
    return learner


def build_segmenter(config: DictConfig, encoder: Encoder, classes: int) -> Segmenter:
    """``config.task.model`` on ``encoder``, after a look at whether the two get along.

    Raises:
        UserError: if they do not.
    """
    task, data = plain(config.task), config.data
    settings = {key: task[key] for key in BUILT}
    segmenter = segmenters.build(task["model"], encoder, classes, list(data.mean), list(data.std), **settings)
    segmenter.to(next(encoder.parameters()).device).eval()
    leave_out_unused(segmenter.encoder, lambda x: [segmenter(x)], task["size"], config.backbone, "task.size")
    return segmenter


def report(summary: dict, run_dir: Path) -> None:
    """The lines a segmentation run ends with."""
    known = {name: value for name, value in summary["iou"].items() if value is not None}
    worst, best = min(known, key=known.get), max(known, key=known.get)
    console.print(
        f"mIoU {100 * summary['miou']:.1f}, pixel accuracy {100 * summary['pixel_accuracy']:.1f}"
        f" ({summary['val_images']} held-out images of {summary['data']});"
        f" from {worst} {100 * known[worst]:.1f} to {best} {100 * known[best]:.1f}"
    )
    written = ", ".join(sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".")))
    console.print(f"{summary['steps']} steps in {summary['seconds']:.0f} s -> {run_dir}: {written}")
