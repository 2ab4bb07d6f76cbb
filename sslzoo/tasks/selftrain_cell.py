"""One run of self-training: one row and column of the paper's tables (Zoph et al. 2020), whatever is labelled."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from sslzoo.config import composed, keys_of
from sslzoo.errors import UserError
from sslzoo.moving_teacher import Moving
from sslzoo.report.progress import console
from sslzoo.selftrain import LossBalance
from sslzoo.tasks import selftrain_boxes, selftrain_classes, selftrain_maps
from sslzoo.tasks.parts import (
    check_flags,
    check_numbers,
    initial,
    initial_name,
    made_once,
    outcome,
    own_settings,
    students,
    teacher_of,
    trained,
    words_of,
)
from sslzoo.tasks.runs import provenance, write_summary


class Kind(Protocol):
    """What is labelled: boxes, the class of every pixel, or of an image. A module each.

    Attributes:
        SETTINGS: its file in ``conf/task``.
        SCORE, NAME: its headline score in the summary of a whole run, and in tables.
        PART_SCORE: the same in the summary and ``metrics.csv`` of a part.
        GIVEN: settings of a part that self-training sets itself -> what to type instead.
        INSTEAD: what to type instead of pretraining's views.
    """

    SETTINGS: str
    SCORE: str
    NAME: str
    PART_SCORE: str
    GIVEN: Mapping[str, str]
    INSTEAD: str

    @staticmethod
    def check(config: DictConfig, part: DictConfig) -> int:
        """Refuse, by UserError, what the teacher's ``part`` could not do; returns the number of labelled images."""

    @staticmethod
    def labelled(config: DictConfig, teacher: Path, place: Path, averaged: bool = False) -> dict:
        """Make pseudo-labels in ``place`` with the run ``teacher``, or its moving teacher, and say what they are."""

    @staticmethod
    def learned(config: DictConfig, place: Path) -> dict:
        """Settings of ``task`` for a student that learns from the labels in ``place``."""

    @staticmethod
    def told(part: dict) -> dict:
        """What of a part's own summary goes into the run's."""


KINDS: dict[str, Kind] = {"detect": selftrain_boxes, "segment": selftrain_maps, "finetune": selftrain_classes}


def kind_of(config: DictConfig) -> Kind:
    """What ``config`` labels, by the verb that trains its parts."""
    return KINDS[config.trains]


def cell(config: DictConfig, overrides: Sequence[str], run_dir: Path, images: int) -> dict:
    """``teacher``, ``pseudo``, ``student`` and ``control`` in ``run_dir``, and what came of them.

    Args:
        config, overrides: the run's.
        run_dir: what is there already is not done again.
        images: labelled ones.
    """
    kind = kind_of(config)
    train = partial(part, config, overrides, images)
    teacher = train(run_dir / "teacher", steps_of(config), None)
    summary = {
        "task": "selftrain",
        **{key: teacher[key] for key in ("method", "data", "model", "metric", "pretrained") if key in teacher},
        "backbone": initial_name(config),
        "init": str(config.init),
        **{key: config[key] for key in ("augment", "label_fraction") if key in config},
        "labelled_images": images,
        "supervised": kind.told(teacher),
    }
    summary[kind.SCORE] = teacher[kind.PART_SCORE]
    if config.self_training or (run_dir / "student" / "summary.json").is_file():
        label, alike = partial(kind.labelled, config), not network_of_student(config)
        found = students(run_dir, teacher, config.iterations, train, label, kind.PART_SCORE, alike)
        if config.teacher is not None:  # what it says at its end stands for what the student has learned from
            label = partial(kind.labelled, config, run_dir / "student", averaged=True)
            found["pseudo"] = made_once(run_dir / "pseudo_moving", label)
        student, control = kind.told(found["student"]), kind.told(found["control"])
        summary |= found | {kind.SCORE: student[kind.SCORE], "student": student, "control": control}
    summary |= provenance(config, overrides)
    write_summary(run_dir, summary)
    report(kind, summary, run_dir)
    return summary


def steps_of(config: DictConfig) -> int:
    """Steps of teacher and student: more for more labels and for stronger augmentation."""
    longer = config.longer.get(config.augment, 1.0) if "augment" in config else 1.0
    return max(1, round(config.steps * config.label_fraction**config.growth * longer))


def part(
    config: DictConfig, overrides: Sequence[str], images: int, place: Path, steps: int, pseudo: Path | None
) -> dict:
    """The summary of the part in ``place``, see ``trained``; ``pseudo`` is a folder of pseudo-labels."""
    student = place.name != "teacher"  # the control is one too, of people alone
    return trained(config, place, lambda: part_words(config, overrides, steps, images, pseudo, student))


def part_words(
    config: DictConfig,
    overrides: Sequence[str],
    steps: int,
    images: int,
    pseudo: Path | None = None,
    student: bool = False,
) -> list[str]:
    """What to type for one part as a run of its own, ``task=detect ...``: all that differs from what it would take.

    Args:
        config: of self-training.
        overrides: what was typed; of it the choices between files of ``conf``, such as ``data=coco``.
        steps: of the optimizer.
        images: labelled ones.
        pseudo: a folder of pseudo-labels.
        student: whether the part has the student's network, where that is another than the teacher's.
    """
    kind, an_epoch = kind_of(config), max(1, images // config.data.batch_size)
    learned = {"pseudo": None} if pseudo is None else kind.learned(config, pseudo)
    given = {
        "backbone": initial_name(config),
        **{f"task.{key}": value for key, value in learned.items()},
        "task.every_epochs": max(1, steps // an_epoch // config.looks),
        "task.optim.warmup_epochs": config.warmup * steps / an_epoch,
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        **(network_of_student(config) if student else {}),
    }
    return words_of(config.trains, config, overrides, own_settings(kind.SETTINGS), given)


def network_of_student(config: DictConfig) -> dict[str, object]:
    """Settings of a part with another network than the teacher's, as ``config.student`` names it; mostly none.

    Raises:
        UserError: if it names something else.
    """
    said = config.get("student")
    if said is None:
        return {}
    named = keys_of(said) if isinstance(said, DictConfig) else {"": said}
    if not named or any(key != "init" and not key.startswith("encoder.") for key in named):
        raise UserError(f"student={said} names no network; give {{init: B}} or {{encoder: {{name: resnet18}}}}")
    return {"backbone" if key == "init" else key: value for key, value in named.items()}


def check(config: DictConfig, overrides: Sequence[str]) -> int:
    """Refuse, by UserError, what would only be noticed after the teacher's training; returns the labelled images."""
    jobs = () if config.jobs is None else ("jobs",)
    limit = () if config.get("unlabelled_images") is None else ("unlabelled_images",)
    check_numbers(config, ("steps", "looks", "iterations", *jobs, *limit), ("growth", "warmup"))
    check_flags(config, "self_training")
    LossBalance(config.alpha)
    if Moving.asked(teacher_of(config), config.self_training) and config.iterations > 1:
        raise UserError(
            f"iterations={config.iterations} and teacher={config.teacher}: a moving teacher is its student's own, so"
            " the second student would be the first again; set iterations=1"
        )
    initial(config)
    teacher = composed(part_words(config, overrides, steps_of(config), config.data.batch_size))
    pl.seed_everything(config.seed, verbose=False)
    images = kind_of(config).check(config, OmegaConf.merge(teacher, {}))
    if network_of_student(config):
        student = composed(part_words(config, overrides, steps_of(config), config.data.batch_size, student=True))
        kind_of(config).check(config, OmegaConf.merge(student, {}))
    return images


def report(kind: Kind, summary: dict, run_dir: Path) -> None:
    """The lines a run of self-training ends with."""
    start = f"init {summary['init']}, {summary['labelled_images']} labelled images of {summary['data']}"
    if "augment" in summary:
        start += f", {summary['augment']}"
    line = outcome(kind.NAME, summary["supervised"][kind.SCORE], summary, kind.SCORE)
    console.print(f"{start}: {line} -> {run_dir}/summary.json", markup=False)
