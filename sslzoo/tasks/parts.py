"""What all self-training shares: parts that are runs of their own, and their order."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sslzoo.blocks import Encoder
from sslzoo.checkpoints.backbone import load_backbone
from sslzoo.config import CONF, composed, keys_of, plain
from sslzoo.data.box_set import BoxSet
from sslzoo.data.cityscapes import Cityscapes
from sslzoo.errors import UserError
from sslzoo.report.progress import console
from sslzoo.tasks import task
from sslzoo.tasks.jobs import devices, together
from sslzoo.tasks.training import refuse_pretraining

SET_HERE = {  # settings of a part that self-training sets itself -> what to type instead
    "backbone": "init",
    "data.label_fraction": "label_fraction",
    "task.pseudo": "threshold",
    "task.teacher": "teacher",
    "task.every_epochs": "looks",
    "task.optim.warmup_epochs": "warmup",
    "trainer.max_steps": "steps",
    "trainer.max_epochs": "steps",
}
MOVES = ("trainer.devices", "trainer.accelerator", "trainer.num_nodes", "data.root", "data.workers", "data.on_error",
         "checkpoint.", "task.also", "task.joint.root")  # fmt: skip
Train = Callable[[Path, int, Path | None], dict]  # of a folder, steps and a folder of pseudo-labels: a part's summary
Label = Callable[[Path, Path], dict]  # of a teacher's folder and one for its labels: what is said of them


def students(
    run_dir: Path, teacher: dict, iterations: int, train: Train, label: Label, score: str, alike: bool = True
) -> dict:
    """What follows a teacher: pseudo-labels and a student, perhaps several times, and a control.

    The control learns from people's labels alone, from as many images as the student.

    Args:
        run_dir: of the whole, with ``teacher`` in it; gets ``pseudo``, ``student`` and ``control``.
        teacher: summary of the first teacher.
        iterations: students; each but the last is the teacher of the next.
        train: makes a part unless it is there.
        label: makes pseudo-labels; not called where they are.
        score: name of the score in the parts' summaries.
        alike: whether student and teacher are one network; else student and control are.

    Returns:
        Summaries of the last ``student``, its ``control`` and ``pseudo``-labels, and the student's gains over teacher
        and control.
    """
    steps, source = teacher["steps"], run_dir / "teacher"
    for turn in range(1, iterations + 1):
        ending = f"_{turn}" if turn > 1 else ""
        labels = run_dir / f"pseudo{ending}"
        found = made_once(labels, partial(label, source))
        source = run_dir / f"student{ending}"
        student = train(source, steps, labels)
        check_start(source, student, run_dir / "teacher", teacher if alike else student)
    control = train(run_dir / "control", steps * student["images_seen"] // teacher["images_seen"], None)
    check_start(run_dir / "control", control, source, student)
    return {
        "student": student,
        "control": control,
        "pseudo": found,
        "gain_at_equal_steps": student[score] - teacher[score],
        "gain_at_equal_images": student[score] - control[score],
    }


def made_once(place: Path, make: Callable[[Path], dict]) -> dict:
    """What ``make`` says of what it makes in ``place``, unless that is there already."""
    said = place / "summary.json"
    return json.loads(said.read_text()) if said.is_file() else make(place)


def check_start(place: Path, part: dict, other_place: Path, other: dict) -> None:
    """Two parts, by their summaries, must have begun with the same weights."""
    if part["start"] != other["start"]:
        raise RuntimeError(f"{place} did not start from the weights that {other_place} started from")


def outcome(name: str, supervised: float, summary: Mapping, score: str) -> str:
    """The end of the line that a run of self-training ends with.

    Args:
        name: of the score, as it is shown.
        supervised: the teacher's score.
        summary: what ``students`` returned; or without a student.
        score: its name in the parts' summaries.
    """
    line = f"supervised {name} {100 * supervised:.1f}"
    if "student" in summary:
        line += (
            f", self-trained {100 * summary['student'][score]:.1f}"
            f" ({100 * summary['gain_at_equal_steps']:+.1f} at as many steps,"
            f" {100 * summary['gain_at_equal_images']:+.1f} to a control of as many images,"
            f" {100 * summary['control'][score]:.1f})"
        )
    return line


def trained(config: DictConfig, place: Path, words: Callable[[], list[str]]) -> dict:
    """The summary of the part in ``place``, which is trained now, or gone on with, unless it is there.

    Args:
        config: of the whole.
        words: what to type for the part, ``task=...`` first; called if it was not begun.
    """
    done, begun = place / "summary.json", place / "config.yaml"
    said = json.loads(done.read_text()) if done.is_file() else {}
    asked = set(config.task.get("also", ()))  # held-out parts that a finished one may not have been scored on
    if not said or asked - set(said.get("also", asked)):
        again = begun.is_file()
        typed = [f"resume={place}", *moved(begun, config)] if again else [*words(), f"run_dir={word(str(place))}"]
        if devices(config) > 1:
            together({place.name: typed}, place.parent / "logs")  # Lightning starts the other ranks itself
        else:
            name = OmegaConf.load(begun).task.name if again else typed[0].removeprefix("task=")
            task(name)(composed([f"task={name}", *typed]), typed)
    return json.loads(done.read_text())


def moved(begun: Path, config: DictConfig) -> list[str]:
    """What to type for a run that goes on elsewhere or otherwise than before: devices, folders, what is done on errors.

    Args:
        begun: its ``config.yaml``.
        config: of the whole, which may have been resumed with other such settings.
    """
    stored, now = keys_of(OmegaConf.load(begun)), keys_of(config)
    return [
        f"{key}={word(now[key])}" for key in stored if key.startswith(MOVES) and key in now and now[key] != stored[key]
    ]


def words_of(
    name: str, config: DictConfig, overrides: Sequence[str], own: set[str], given: Mapping[str, object]
) -> list[str]:
    """What to type for one part as a run of its own, ``task=NAME ...``: all that differs from what it would take.

    Args:
        name: of the part's task.
        config: of the whole.
        overrides: what was typed; of it the choices between files of ``conf``, such as ``data=coco``.
        own: settings of the whole that a part has not.
        given: settings that a part gets instead of those of the whole.
    """
    left = own | {"optim", "views"}  # pretraining's, which no part looks at; sizes of views follow image_size
    wanted = {key: value for key, value in keys_of(config).items() if key.partition(".")[0] not in left}
    wanted |= {"task.name": name, "run_dir": None, "resume": None, **given}
    choices = [f"task={name}"]
    for override in overrides:
        key = override.partition("=")[0]
        if (CONF / key).is_dir() and key not in ("task", "protocol"):
            choices.append(override)
    usual = keys_of(composed(choices))
    return choices + [
        f"{'' if key in usual else '++'}{key}={word(value)}"
        for key, value in wanted.items()
        if key not in usual or usual[key] != value
    ]


def word(value: object) -> str:
    """``value`` as it is typed; in quotes only where it needs them."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{word(of_key)}' for key, of_key in value.items())}}}"
    bare = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./-]*", value)
    return value if bare and value.lower() not in ("null", "true", "false", "nan", "inf") else json.dumps(value)


def own_settings(name: str = "selftrain") -> set[str]:
    """Names of the settings that ``conf/task/NAME.yaml`` has beside those of what it trains."""
    files = (CONF / "selftrain" / "base.yaml", CONF / "task" / f"{name}.yaml")
    return {key for file in files for key in OmegaConf.load(file)} - {"defaults", "task"}


def initial_name(config: DictConfig) -> str:
    """The backbone that ``config.init`` means."""
    return str(config.imagenet if config.init == "imagenet" else config.init)


def initial(config: DictConfig) -> Encoder:
    """The encoder that ``config.init`` means.

    Raises:
        UserError: if it is not at hand.
    """
    if config.init == "imagenet":
        encoder = load_backbone(config.imagenet, "auto")
        if not encoder.metadata["pretrained"]:
            raise UserError(
                f"init=imagenet is {config.imagenet}, whose weights are not in the local cache; fetch them with"
                f" python -m sslzoo task=knn backbone={config.imagenet} pretrained=true, or give another init"
            )
        return encoder
    return load_backbone(config.init, config.pretrained, plain(config.encoder))


def teacher_of(config: DictConfig) -> object:
    """The settings of a moving teacher that ``config.teacher`` gives a student, by default with its own threshold.

    None for a fixed teacher.
    """
    if not isinstance(config.teacher, DictConfig):
        return config.teacher
    return {"threshold": config.threshold, **plain(config.teacher)}


def how_sure(config: DictConfig, averaged: bool) -> tuple[float | str, bool]:
    """The threshold of a labelling, and whether a moving teacher labels all of these images anew.

    Args:
        config: of self-training.
        averaged: whether it is the moving teacher's labelling.
    """
    if averaged:
        return teacher_of(config)["threshold"], False
    return config.threshold, config.teacher is not None


def tell_moving(images: int) -> None:
    """The line that stands for the quality of labels that no student will see."""
    console.print(f"a moving teacher labels all {images} images anew in every step, so these labels name them only")


def trained_weights(run_dir: Path) -> dict[str, Tensor]:
    """The learner's weights and buffers in a part's checkpoint, without what a student or joint training adds."""
    state = torch.load(run_dir / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    while any(name.startswith("learner.") for name in state):  # of a student, of joint training, or of both
        state = {name.removeprefix("learner."): value for name, value in state.items() if name.startswith("learner.")}
    return state


def averaged_weights(run_dir: Path) -> list[dict[str, Tensor]]:
    """The weights of the moving teacher in a student's checkpoint: of each module that it follows, perhaps none."""
    state = torch.load(run_dir / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        _, copy, rest = name.rpartition("teacher.average.copies.")
        if copy:
            place, _, own = rest.partition(".")
            found.setdefault(int(place), {})[own] = value
    return [found.get(place, {}) for place in range(max(found) + 1)]


Set = TypeVar("Set", BoxSet, Cityscapes)


def at_most(limit: int | None, images: Set, seed: int) -> Set:
    """``limit`` images of a set, all of them for None; fewer lie among more."""
    if limit is None or limit >= len(images):
        return images
    order = np.random.default_rng([seed, len(images)]).permutation(len(images))
    return images.subset(np.sort(order[:limit]))


# Before anything is written


def check_typed(overrides: Sequence[str], given: Mapping[str, str], augmentation: str) -> None:
    """Refuse, by UserError, what self-training sets itself, and what is pretraining's.

    Args:
        given: setting of a part -> what to type instead.
        augmentation: what to type instead of pretraining's views.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in given:
            raise UserError(f"{key} is set by task=selftrain for each part of a run; type {given[key]}= instead")
    refuse_pretraining(overrides, "selftrain", f"task.optim.* or {augmentation}")


def check_flags(config: DictConfig, *keys: str) -> None:
    """Refuse, by UserError, settings that are neither true nor false."""
    for key in keys:
        if not isinstance(config[key], bool):
            raise UserError(f"{key}={config[key]} is neither true nor false")


def enough(images: Sized, batch_size: int) -> None:
    """Refuse, by UserError, fewer images to label than a batch takes."""
    if len(images) < batch_size:
        raise UserError(
            f"data.batch_size={batch_size} is more than the {len(images)} images left to label; set it to at most"
            f" {len(images)}, or label_fraction= lower"
        )


def check_numbers(config: DictConfig, whole: Sequence[str], real: Sequence[str]) -> None:
    """Refuse, by UserError, ``whole`` settings that are no whole numbers of 1 or more, ``real`` ones below 0."""
    for key in whole:
        if not isinstance(config[key], int) or config[key] < 1:
            raise UserError(f"{key}={config[key]} is no whole number of 1 or more")
    for key in real:
        if not (isinstance(config[key], int | float) and config[key] >= 0 and math.isfinite(config[key])):
            raise UserError(f"{key}={config[key]} is no number of 0 or more")
    if not isinstance(config.init, str):
        raise UserError(f"init={config.init} are several; outside of grid= give one")
