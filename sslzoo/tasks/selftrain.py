"""Self-training of detectors: teacher, pseudo-labels, student and control, each in a folder of the run; or a grid.

Classifiers are ``sslzoo.tasks.selftrain_classes``, the same steps on data of images to classify.
"""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from sslzoo.config import composed
from sslzoo.errors import UserError
from sslzoo.report.progress import console
from sslzoo.selftrain import LossBalance, check_threshold
from sslzoo.tasks import detect, selftrain_classes
from sslzoo.tasks.labelling import labelled, unlabelled
from sslzoo.tasks.parts import (
    check_numbers,
    check_typed,
    initial,
    initial_name,
    outcome,
    own_settings,
    students,
    trained,
    words_of,
)
from sslzoo.tasks.runs import provenance, write_summary
from sslzoo.tasks.training import resumed, started

# Settings of task=detect that a run of self-training gives its parts, and what to type instead
GIVEN = {
    "backbone": "init",
    "data.label_fraction": "label_fraction",
    "task.augment": "augment",
    "task.alpha": "alpha",
    "task.pseudo": "threshold",
    "task.every_epochs": "looks",
    "task.optim.warmup_epochs": "warmup",
    "trainer.max_steps": "steps",
    "trainer.max_epochs": "steps",
}


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train, label, train again: what is there already is not done again; or all cells of ``config.grid``.

    The kind of the data decides whether it is done for boxes or for classes, see ``config.by_kind_of_data``.
    """
    if config.resume is not None:
        config, _ = resumed(config, overrides)
        overrides = typed_words(Path(config.run_dir))
    if "per_class" in config:
        return selftrain_classes.run(config, overrides)
    check_typed(overrides, GIVEN, "augment")
    if config.grid is not None:
        from sslzoo.tasks import selftrain_grid  # which needs this file

        return selftrain_grid.run(config, overrides)
    check(config, overrides)
    run_dir = started(config, overrides)
    return cell(config, overrides, run_dir)


def typed_words(run_dir: Path) -> list[str]:
    """What was typed for a run, without the command before it."""
    return shlex.split((run_dir / "command.txt").read_text())[3:]


def cell(config: DictConfig, overrides: Sequence[str], run_dir: Path) -> dict:
    """One row and column of the paper's tables: ``teacher``, ``pseudo``, ``student`` and ``control`` in ``run_dir``."""
    steps = steps_of(config)
    train, _ = detect.load_sets(config, masks_of(config))
    train_part = partial(part, config, overrides, len(train))
    teacher = train_part(run_dir / "teacher", steps, None)
    summary = {
        "task": "selftrain",
        "method": teacher["method"],
        "data": train.name,
        "model": config.task.model,
        "metric": config.task.metric,
        "backbone": teacher["backbone"],
        "pretrained": teacher["pretrained"],
        "init": str(config.init),
        "augment": config.augment,
        "label_fraction": config.label_fraction,
        "labelled_images": len(train),
        "map": teacher["map"],
        "supervised": told(teacher),
    }
    if config.self_training:
        found = students(run_dir, teacher, config.iterations, train_part, partial(labelled, config, train), score="map")
        summary |= found | {
            "map": found["student"]["map"],
            "student": told(found["student"]),
            "control": told(found["control"]),
        }
    summary |= provenance(config, overrides)
    write_summary(run_dir, summary)
    report(summary, run_dir)
    return summary


def told(part: dict) -> dict:
    """What of a part's own summary goes into the run's."""
    names = ("map", "map_50", "map_75", "steps", "images_seen", "train_images", "seconds", "loss", "start")
    return {name: part.get(name) for name in names}


def steps_of(config: DictConfig) -> int:
    """Steps of teacher and student: more for more labels and for stronger augmentation."""
    longer = config.longer.get(config.augment, 1.0)
    return max(1, round(config.steps * config.label_fraction**config.growth * longer))


def masks_of(config: DictConfig) -> bool:
    return str(config.task.model).startswith("mask")


# Parts that train


def part(
    config: DictConfig, overrides: Sequence[str], images: int, place: Path, steps: int, pseudo: Path | None
) -> dict:
    """The summary of the part in ``place``, see ``trained``; ``pseudo`` is a folder of pseudo-labels."""
    file = None if pseudo is None else pseudo / "labels.json"
    return trained(config, place, lambda: part_words(config, overrides, steps, images, file))


def part_words(
    config: DictConfig, overrides: Sequence[str], steps: int, images: int, pseudo: Path | None = None
) -> list[str]:
    """What to type for one part as a run of its own, ``task=detect ...``: all that differs from what it would take.

    Args:
        config: of self-training.
        overrides: what was typed; of it the choices between files of ``conf``, such as ``data=coco``.
        steps: of the optimizer.
        images: labelled ones.
        pseudo: a file of pseudo-labels.
    """
    an_epoch = max(1, images // config.data.batch_size)
    given = {
        "backbone": initial_name(config),
        "task.pseudo": None if pseudo is None else str(pseudo),
        "task.every_epochs": max(1, steps // an_epoch // config.looks),
        "task.optim.warmup_epochs": config.warmup * steps / an_epoch,
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
    }
    return words_of("detect", config, overrides, own_settings(), given)


# Before anything is written


def check(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse, by UserError, what would only be noticed after the teacher's training."""
    check_numbers(config, ("steps", "looks", "iterations", "jobs"), ("growth", "warmup"))
    if config.unlabelled_images is not None and config.unlabelled_images < config.data.batch_size:
        raise UserError(
            f"unlabelled_images={config.unlabelled_images} is less than data.batch_size={config.data.batch_size}"
        )
    LossBalance(config.alpha)
    encoder = initial(config)
    train, val = detect.load_sets(config, masks_of(config))
    if config.self_training:
        check_threshold(config.threshold)
        unlabelled(config)
    teacher = composed(part_words(config, overrides, steps_of(config), len(train)))
    detect.load_data(teacher, train, val, masks_of(config))
    pl.seed_everything(config.seed, verbose=False)
    detect.build_detector(teacher, encoder, len(train.classes))


def report(summary: dict, run_dir: Path) -> None:
    """The lines a run of self-training ends with."""
    start = f"init {summary['init']}, {summary['augment']}, {summary['label_fraction']:.0%} of the labels"
    line = outcome("AP", summary["supervised"]["map"], summary, "map")
    console.print(f"{start}: {line} -> {run_dir}/summary.json", markup=False)
