"""Train a detector on a backbone, and score it on held-out images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from sslzoo.blocks import Encoder
from sslzoo.config import built, plain
from sslzoo.data.box_module import Boxes, box_example, twin_example
from sslzoo.data.box_set import BoxSet
from sslzoo.data.boxes import chosen, further, load_boxes
from sslzoo.data.mixed import Mixed
from sslzoo.data.pseudo_labels import PseudoLabels
from sslzoo.downstream import detectors
from sslzoo.downstream.average_precision import write_results
from sslzoo.downstream.detection import Detection, check_metric, first_batches, predict, score
from sslzoo.downstream.evaluate import Evaluate
from sslzoo.downstream.precise_bn import check_images, estimate_batchnorm
from sslzoo.downstream.taught import TaughtDetection
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.moving_teacher import Moving
from sslzoo.optim import Optim
from sslzoo.report.detections import curves, predictions
from sslzoo.report.progress import console
from sslzoo.selftrain import LossBalance, Student, fingerprint
from sslzoo.tasks import dense
from sslzoo.tasks.dense import held_out, leave_out_unused
from sslzoo.tasks.joint import jointly, told
from sslzoo.tasks.runs import backbone_and_config, device, provenance, write_summary
from sslzoo.tasks.training import (
    refuse_pretraining,
    resumed,
    tell_skipped,
)

# What build's arguments are called in conf/task/detect.yaml: the same
BUILT = (
    *("min_size", "max_size", "channels", "convs", "norm", "rois", "proposals"),
    *("score", "nms", "iou", "sigma", "detections"),
)


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train ``config.task.model`` on ``config.backbone``; leave its scores, what it found, curves and pictures."""
    checkpoint = None
    if config.resume is not None:
        config, checkpoint = resumed(config, overrides)
    check(config, overrides)
    task, masks = config.task, with_masks(config)
    pl.seed_everything(config.seed, verbose=False)
    encoder, sized = backbone_and_config(OmegaConf.merge(config, {}))
    pl.seed_everything(config.seed, verbose=False)  # heads start alike, whatever the backbone
    train, val = load_sets(config, masks)
    also = load_further(config, train, masks)
    detector = build_detector(sized, encoder, len(train.classes))
    data = boxes = load_data(config, train, val, masks)
    optim = built(task.optim, "task.optim", Optim, batch_size=boxes.batch_size)
    module = learner = Detection(detector, optim, task.clip)
    learner.seed = config.seed
    start = fingerprint(learner)
    if task.teacher is not None:
        data, module = taught(config, learner, boxes)
    elif task.pseudo is not None:
        labelled = PseudoLabels.read(task.pseudo, train, masks).with_boxes()
        others = OmegaConf.merge(config, {"seed": config.seed + 1})  # an order and views of their own
        data = Mixed(boxes, load_data(others, labelled, val, masks))
        module = Student(learner, LossBalance(task.alpha))
    student = module
    module, data = jointly(sized, student, data)

    found: list[dict] = []  # at the last look

    def look(_: Method) -> dict[str, float]:
        if task.precise_bn:
            estimate_batchnorm(learner, first_batches(boxes.loader, task.precise_bn))
        found[:] = predict(learner, val)
        return score(val, found, task.metric, masks)

    evaluate = Evaluate(look, task.every_epochs)
    images = f"{len(train)} images of {train.name}"
    training = dense.train(module, data, images, evaluate, ("AP", "map"), config, overrides, checkpoint)
    run_dir, trainer = training.run_dir, training.trainer
    if not found:  # a run resumed after its end looks no more; ranks find together, as in a look
        found = predict(learner, val)
    more = {split: score(part, predict(learner, part), task.metric, masks) for split, part in also.items()}
    if not trainer.is_global_zero:
        return {}

    write_results(run_dir / "results.json", val, found)
    title = f"{task.model} on {encoder.metadata['method']}, {train.name}, seed {config.seed}"
    curves(training.rows.rows, run_dir / "curves.png", title)
    predictions(run_dir / "predictions.png", val, found, title)
    summary = {
        "task": "detect",
        "method": encoder.metadata["method"],
        "data": train.name,
        "model": task.model,
        **{name: evaluate.values.get(name) for name in ("map", "map_50", "map_75")},
        **evaluate.values,
        "also": more,
        "metric": task.metric,
        "boxes_per_image": sum(len(each["scores"]) for each in found) / len(found),
        "true_boxes_per_image": len(val.labels) / len(val),
        "start": start,
        "teacher": None if task.teacher is None else student.told(),
        "joint": told(config, module, trainer.global_step),
        **dense.effort(training, student, data),
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
    refuse_pretraining(overrides, "detect", "task.optim.* or task.augment")
    if config.data.label_list is not None:
        raise UserError("data.label_list names images to classify; for task=detect set data.label_fraction instead")
    check_metric(task.metric)
    check_images(task.precise_bn)
    Moving.asked(task.teacher, task.pseudo)
    if not isinstance(task.also, ListConfig) or not all(isinstance(split, str) for split in task.also):
        raise UserError(f"task.also={task.also} is no list of held-out parts; write task.also=[valseen2017]")
    if not (task.clip is None or (isinstance(task.clip, int | float) and task.clip > 0)):
        raise UserError(f"task.clip={task.clip} is no norm of gradients; give a number above 0, or null")
    built(task.optim, "task.optim", Optim, batch_size=config.data.batch_size)
    device(config)


def with_masks(config: DictConfig) -> bool:
    """Whether the detector finds masks too."""
    return str(config.task.model).startswith("mask")


def load_sets(config: DictConfig, masks: bool) -> tuple[BoxSet, BoxSet]:
    """The training images of ``config.data``, and the held-out ones that can be read.

    With ``task.drop_empty`` training leaves out images without boxes, or with none but crowds', as detectron2 does.

    Raises:
        UserError: if these data have no boxes.
    """
    settings = chosen(plain(config.data))
    train, val = load_boxes(**settings, masks=masks, segmentation=masks, seed=config.seed)
    if config.task.drop_empty:
        image = np.repeat(np.arange(len(train)), np.diff(train.starts))
        train = train.subset(np.unique(image[~train.crowd]))
    val = held_out(val, config.data.on_error)
    if not len(val.labels):
        raise UserError(f"the held-out images of data={val.name} have no boxes to score by; choose data that has some")
    return train, val


def load_further(config: DictConfig, train: BoxSet, masks: bool) -> dict[str, BoxSet]:
    """The further held-out parts of ``task.also``, as ``load_sets`` loads the first."""
    parts = {split: further(plain(config.data), split, train, masks) for split in config.task.also}
    return {split: held_out(part, config.data.on_error) for split, part in parts.items()}


def load_data(config: DictConfig, train: BoxSet, val: BoxSet, masks: bool) -> Boxes:
    """Batches of ``train`` as ``config`` asks for them."""
    if config.trainer.accumulate_grad_batches != 1:
        raise UserError("task=detect does not accumulate gradients: set trainer.accumulate_grad_batches=1")
    sizes = config.task.min_size
    size = sizes if isinstance(sizes, int) else sizes[-1]
    wanted = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
    return Boxes(
        train,
        val,
        box_example(train, config.task.augment, size, config.seed, wanted),
        config.data.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        on_error=config.data.on_error,
    )


def taught(config: DictConfig, learner: Detection, boxes: Boxes) -> tuple[Mixed, TaughtDetection]:
    """Batches of ``boxes`` and of all images of the file of pseudo-labels, and who learns from them."""
    task, moving = config.task, Moving.asked(config.task.teacher, config.task.pseudo)
    images = PseudoLabels.read(task.pseudo, boxes.train).images
    size = task.min_size if isinstance(task.min_size, int) else task.min_size[-1]
    seed = config.seed + 1  # an order and views of their own
    example = twin_example(images, task.augment, size, seed)
    pseudo = Boxes(images, boxes.val, example, boxes.batch_size, seed, boxes.workers, boxes.on_error)
    return Mixed(boxes, pseudo), TaughtDetection(learner, LossBalance(task.alpha), moving)


def build_detector(config: DictConfig, encoder: Encoder, classes: int) -> nn.Module:
    """``config.task.model`` on ``encoder``, after a look at whether the two get along.

    Raises:
        UserError: if they do not.
    """
    settings = {key: value for key, value in plain(config.task).items() if key in BUILT}
    mean, std = list(config.data.mean), list(config.data.std)
    detector = detectors.build(config.task.model, encoder, classes, mean, std, **settings)
    detector.to(next(encoder.parameters()).device)
    body = detector.backbone.eval()
    wanted = config.task.min_size if isinstance(config.task.min_size, int) else config.task.min_size[-1]
    side = -(-wanted // body.divisible) * body.divisible
    head = detector.roi_heads.parameters() if "rcnn" in config.task.model else ()  # C4's is the last stage
    leave_out_unused(body.encoder, lambda x: body(x).values(), side, config.backbone, "task.min_size", head)
    return detector


def report(summary: dict, run_dir: Path) -> None:
    """The lines a detection run ends with."""
    of = {"map": "AP", "map_50": "AP50", "map_75": "AP75", "mask_map": "mask AP"}
    scores = ", ".join(f"{name} {100 * summary[key]:.1f}" for key, name in of.items() if summary.get(key) is not None)
    console.print(
        f"{scores} ({summary['metric']}, {summary['val_images']} held-out images of {summary['data']}),"
        f" {summary['boxes_per_image']:.1f} boxes an image of {summary['true_boxes_per_image']:.1f}"
    )
    for split, of_split in summary["also"].items():
        console.print(f"{split}: AP {100 * of_split['map']:.1f}, AP50 {100 * of_split['map_50']:.1f}")
    written = ", ".join(sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".")))
    console.print(f"{summary['steps']} steps in {summary['seconds']:.0f} s -> {run_dir}: {written}")
