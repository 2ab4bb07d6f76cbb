"""Self-training: teacher, pseudo-labels, student and control, each in a folder of the run; or a grid of such runs."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from sslzoo.checkpoints.backbone import load_backbone
from sslzoo.config import CONF, composed, keys_of, plain
from sslzoo.errors import UserError
from sslzoo.report.progress import console
from sslzoo.selftrain import LossBalance, check_threshold
from sslzoo.tasks import detect
from sslzoo.tasks.jobs import several_devices, together
from sslzoo.tasks.labelling import labelled, unlabelled
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
    """Train, label, train again: what is there already is not done again; or all cells of ``config.grid``."""
    if config.resume is not None:
        config, _ = resumed(config, overrides)
        overrides = typed_words(Path(config.run_dir))
    for override in overrides:
        key = override.partition("=")[0]
        if key in GIVEN:
            raise UserError(f"{key} is set by task=selftrain for each part of a run; type {GIVEN[key]}= instead")
        if override.startswith(("optim.", "views=", "views.")):
            raise UserError(f"{override} is pretraining's; for task=selftrain type task.optim.* or augment")
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
    teacher = trained(config, overrides, run_dir / "teacher", steps, len(train))
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
        source = run_dir / "teacher"
        for turn in range(1, config.iterations + 1):
            ending = f"_{turn}" if turn > 1 else ""
            labels = run_dir / f"pseudo{ending}"
            found = labelled(config, train, source, labels)
            place = source = run_dir / f"student{ending}"
            student = trained(config, overrides, place, steps, len(train), pseudo=labels / "labels.json")
            if student["start"] != teacher["start"]:
                raise RuntimeError(f"{place} did not start from the weights that {run_dir / 'teacher'} started from")
        again = steps * student["images_seen"] // teacher["images_seen"]
        control = trained(config, overrides, run_dir / "control", again, len(train))
        summary |= {
            "map": student["map"],
            "student": told(student),
            "control": told(control),
            "pseudo": found,
            "gain_at_equal_steps": student["map"] - teacher["map"],
            "gain_at_equal_images": student["map"] - control["map"],
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


def trained(
    config: DictConfig,
    overrides: Sequence[str],
    place: Path,
    steps: int,
    images: int,
    pseudo: Path | None = None,
) -> dict:
    """The summary of the part in ``place``, which is trained now, or gone on with, unless it is there."""
    done = place / "summary.json"
    if not done.is_file():
        again = [f"resume={place}"]
        words = again if (place / "config.yaml").is_file() else part_words(config, overrides, steps, images, pseudo)
        if words is not again:
            words = [*words, f"run_dir={word(str(place))}"]
        if several_devices(config):
            together({place.name: words}, place.parent / "logs")  # Lightning starts the other ranks itself
        else:
            wanted = composed(["task=detect", *words])
            detect.run(wanted, words)
    return json.loads(done.read_text())


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
    own = own_settings()
    wanted = {key: value for key, value in keys_of(config).items() if key.partition(".")[0] not in own}
    wanted |= {
        "backbone": str(config.imagenet if config.init == "imagenet" else config.init),
        "task.name": "detect",
        "task.pseudo": None if pseudo is None else str(pseudo),
        "task.every_epochs": max(1, steps // an_epoch // config.looks),
        "task.optim.warmup_epochs": config.warmup * steps / an_epoch,
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        "run_dir": None,
        "resume": None,
    }
    choices = ["task=detect"]
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
    bare = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./-]*", value)
    return value if bare and value.lower() not in ("null", "true", "false", "nan", "inf") else json.dumps(value)


def own_settings() -> set[str]:
    """Names of the settings that self-training has beside those of what it trains."""
    return set(OmegaConf.load(CONF / "task" / "selftrain.yaml")) - {"defaults", "task"}


# Before anything is written


def check(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse, by UserError, what would only be noticed after the teacher's training."""
    for key, least in (("steps", 1), ("looks", 1), ("iterations", 1), ("jobs", 1)):
        if not isinstance(config[key], int) or config[key] < least:
            raise UserError(f"{key}={config[key]} is no whole number of {least} or more")
    for key in ("growth", "warmup"):
        if not (isinstance(config[key], int | float) and config[key] >= 0 and math.isfinite(config[key])):
            raise UserError(f"{key}={config[key]} is no number of 0 or more")
    if config.unlabelled_images is not None and config.unlabelled_images < config.data.batch_size:
        raise UserError(
            f"unlabelled_images={config.unlabelled_images} is less than data.batch_size={config.data.batch_size}"
        )
    if not isinstance(config.init, str):
        raise UserError(f"init={config.init} are several; outside of grid= give one")
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


def initial(config: DictConfig):
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


def report(summary: dict, run_dir: Path) -> None:
    """The lines a run of self-training ends with."""
    start = f"init {summary['init']}, {summary['augment']}, {summary['label_fraction']:.0%} of the labels"
    line = f"{start}: supervised AP {100 * summary['supervised']['map']:.1f}"
    if "student" in summary:
        line += (
            f", self-trained {100 * summary['map']:.1f} ({100 * summary['gain_at_equal_steps']:+.1f} at as many steps,"
            f" {100 * summary['gain_at_equal_images']:+.1f} to a control of as many images,"
            f" {100 * summary['control']['map']:.1f})"
        )
    console.print(f"{line} -> {run_dir}/summary.json", markup=False)
