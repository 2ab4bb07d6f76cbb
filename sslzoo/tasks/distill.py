"""Distil a fine-tuned network into a student, on images that need no labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from sslzoo.checkpoints.backbone import load_backbone, save_backbone
from sslzoo.checkpoints.classifier import Tuned, load_tuned, save_classifier
from sslzoo.config import config_hash, plain
from sslzoo.data.images import ImageSet
from sslzoo.data.module import Images
from sslzoo.data.subsets import as_list, labelled
from sslzoo.downstream.base import accuracies, answers
from sslzoo.downstream.distill import Distill
from sslzoo.downstream.features import check_size
from sslzoo.downstream.interval import interval
from sslzoo.errors import UserError
from sslzoo.report.progress import console
from sslzoo.tasks.runs import device, provenance, write_summary
from sslzoo.tasks.training import (
    check_strides,
    effort,
    fit_batch,
    learn,
    leave_cores_to_views,
    own_optim,
    read_checkpoint,
    resumed,
    started,
    task_images,
)


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train a student by ``config.task.teacher`` on all training images; leave it, and the score of both."""
    config, checkpoint = resumed(config, overrides)
    pl.seed_everything(config.seed, verbose=False)
    task = config.task
    if task.teacher is None:
        raise UserError("task=distill needs task.teacher=: the directory of a task=finetune run")
    teacher = load_tuned(task.teacher)
    sized = as_the_teacher_saw(config, teacher)
    student = load_backbone(config.backbone or "random", config.pretrained, plain(config.encoder))
    named = f"backbone={config.backbone}" if config.backbone else f"encoder.name={config.encoder.name}"
    check_images(student.metadata, sized, named)
    check_size(student, sized.image_size)
    image = torch.zeros(1, 3, sized.image_size, sized.image_size)
    check_strides(config, student, [image], "or another encoder; the size is the teacher's")
    data = task_images(sized, overrides)
    check_classes_of(teacher, data.train, task.teacher)
    rows = labels_used(data, config)
    fit_batch(data)
    optim = own_optim(config, data)
    module = Distill(
        student,
        teacher,
        optim,
        task.loss,
        task.temperature,
        task.labelled_weight,
        task.crd_weight,
        len(data.train),
        task.dim,
        task.negatives,
    )
    module.seed = config.seed
    accelerator, _ = device(config)
    leave_cores_to_views(accelerator, config)
    state = read_checkpoint(checkpoint, module, f"task=distill of {task.teacher}") if checkpoint else None
    run_dir = started(config, overrides, as_list(data.train, rows))
    console.print(f"distill {task.teacher} on {len(data.train)} images of {data.train.name}, {run_dir}")
    taught = {} if data.val is None else answers_of(teacher, data, accelerator)

    trainer, metrics, evaluate = learn(module, data, config, run_dir, state, checkpoint)
    if not trainer.is_global_zero:
        return {}
    backbone = save_backbone(
        student,
        run_dir / "backbone.safetensors",
        method=f"{teacher.encoder.metadata['method']}+distill",
        mean=list(sized.data.mean),
        std=list(sized.data.std),
        image_size=sized.image_size,
        config_hash=config_hash(config),
    )
    save_classifier(module.classifier, run_dir / "classifier.safetensors", teacher.classes)
    summary = {
        "task": "distill",
        "method": teacher.encoder.metadata["method"],
        "data": data.train.name,
        **evaluate.values,
        "distill_top1_interval": list(interval(evaluate.right)) if len(evaluate.right) else None,
        **taught,
        "distill_from": task.loss,
        "temperature": task.temperature,
        "labelled_weight": task.labelled_weight,
        "labelled_images": len(rows),
        **effort(trainer, data, metrics, optim),
        "backbone": str(backbone),
        "teacher": str(task.teacher),
        **provenance(config, overrides),
    }
    write_summary(run_dir, summary)
    report(summary, run_dir)
    return summary


def as_the_teacher_saw(config: DictConfig, teacher: Tuned) -> DictConfig:
    """``config`` with the size and the normalisation of the images that the teacher was tuned on."""
    seen = teacher.encoder.metadata
    config = OmegaConf.merge(config, {"image_size": seen["image_size"]})
    config.data.mean, config.data.std = seen["mean"], seen["std"]
    return config


def check_images(metadata: dict, config: DictConfig, named: str) -> None:
    """Refuse a student that was trained on images of another size or normalisation: both networks see the same."""
    for key, needed in (("image_size", config.image_size), ("mean", config.data.mean), ("std", config.data.std)):
        if key in metadata and metadata[key] != needed:
            raise UserError(
                f"{named} was trained with {key}={metadata[key]}, the teacher {config.task.teacher} with {needed};"
                " take a student of the same images, or leave backbone out for a random one"
            )


def check_classes_of(teacher: Tuned, train: ImageSet, named: str) -> None:
    """Refuse a teacher of other classes than those of the data, where these are known."""
    if train.classes and list(train.classes) != teacher.classes:
        other = sorted(set(train.classes) ^ set(teacher.classes))
        what = f"e.g. {other[0]} is in one of them only" if other else "in another order"
        raise UserError(
            f"task.teacher={named} names {len(teacher.classes)} classes, {train.name} has {len(train.classes)},"
            f" {what}; give the data the teacher was tuned on, or unlabelled images"
        )


def labels_used(data: Images, config: DictConfig) -> np.ndarray:
    """Rows whose labels the loss may use, none without ``labelled_weight``; the others' become unknown, -1."""
    train, chosen = data.train, config.data.label_fraction != 1 or config.data.label_list
    rows = np.arange(0)
    if chosen and not config.task.labelled_weight:
        raise UserError(
            "data.label_fraction and data.label_list choose labels, but task.labelled_weight=0 uses none; set it to a"
            " share of the loss, e.g. 0.1"
        )
    if config.task.labelled_weight:
        rows = labelled(train, config.data.label_fraction, config.data.label_list, config.seed)
    labels = np.full_like(train.labels, -1)
    labels[rows] = train.labels[rows]
    data.train = ImageSet(labels, train.classes, train.images, train.files, train.name)
    return rows


def answers_of(teacher: Tuned, data: Images, accelerator: str) -> dict[str, float | None]:
    """The teacher's own accuracy on the held-out images."""
    found = answers(teacher.to(accelerator), data.val, data.clean, data.on_error)
    return accuracies(found, "teacher")


def report(summary: dict, run_dir: Path) -> None:
    """The line a distillation ends with."""
    student, teacher = summary.get("distill_top1"), summary.get("teacher_top1")
    if student is None:
        console.print(f"no labelled held-out images to score by -> {run_dir}/summary.json")
        return
    console.print(
        f"student top-1 {100 * student:.2f} %, teacher {100 * teacher:.2f} % (held-out images of {summary['data']},"
        f" {summary['seconds']:.0f} s) -> {run_dir}/summary.json"
    )
