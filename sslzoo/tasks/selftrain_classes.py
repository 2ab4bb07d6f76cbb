"""Self-training of classifiers: what a part learns from, and how a teacher's run names the classes of other images.

Noisy Student (Xie et al. 2020, arXiv 1911.04252) in the three steps that detection takes: see ``sslzoo.selftrain``.
"""

from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sslzoo.checkpoints.classifier import load_tuned
from sslzoo.data.images import NAMES, ImageSet
from sslzoo.data.module import Images, clean_batches
from sslzoo.data.pseudo_classes import PseudoClasses, quality
from sslzoo.downstream.taught import followed
from sslzoo.errors import UserError
from sslzoo.report.progress import console
from sslzoo.report.pseudo import confidence_histogram
from sslzoo.selftrain import confident, equal_classes
from sslzoo.tasks import finetune
from sslzoo.tasks.parts import (
    SET_HERE,
    averaged_weights,
    check_flags,
    check_numbers,
    enough,
    how_sure,
    teacher_of,
    tell_moving,
)
from sslzoo.tasks.runs import device, write_summary

SETTINGS = "selftrain_classes"  # its file in conf/task
SCORE, NAME = "top1", "top-1"  # of a whole run, and in tables
PART_SCORE = "finetune_top1"
INSTEAD = "task.views.*"  # of pretraining's views
GIVEN = SET_HERE


def learned(config: DictConfig, place: Path) -> dict:
    """Settings of ``task`` for a student that learns from the labels in ``place``."""
    pseudo = {"file": str(place / "labels.npz"), "soft": config.soft, "alpha": config.alpha}
    return {"pseudo": pseudo, "teacher": teacher_of(config)}


def told(part: dict) -> dict:
    """What of a part's own summary goes into the run's."""
    scores = {"top1": part[PART_SCORE], "top1_interval": part[f"{PART_SCORE}_interval"], "top5": part["finetune_top5"]}
    names = ("steps", "images_seen", "labelled_images", "seconds", "loss", "start", "teacher")
    return scores | {name: part[name] for name in names}


# The part that labels


def labelled(config: DictConfig, teacher: Path, place: Path, averaged: bool = False) -> dict:
    """Make pseudo-labels in ``place`` with the run ``teacher``, and say what they are.

    Args:
        config: of self-training.
        averaged: label with the moving teacher of that run instead, at its end.

    Raises:
        UserError: if too few images are named surely enough for one batch.
    """
    seen = finetune.ready(OmegaConf.load(teacher / "config.yaml"), [])  # the images as the teacher saw them
    whole = seen.whole
    rows = unlabelled(whole, seen.rows)
    console.print(f"labelling {len(rows)} images of {whole.name} with {teacher}")
    threshold, anew = how_sure(config, averaged)
    network = load_tuned(teacher).to(device(config)[0])
    if averaged:
        for part, weights in zip(followed(network), averaged_weights(teacher), strict=True):
            part.load_state_dict(weights)
    rows, probabilities = answers(network, whole, seen.data, rows)
    sure = confident(probabilities, threshold)
    if len(sure) < config.data.batch_size and config.teacher is None:
        raise UserError(
            f"only {len(sure)} of {len(rows)} unlabelled images have a class of probability {threshold:g} or"
            f" more, and a batch takes {config.data.batch_size} (the best has {probabilities.max(initial=0):.2f}): the"
            " teacher is too unsure; set a lower threshold, or train longer with steps="
        )
    taken = sure if config.per_class is None else equal_classes(probabilities, sure, config.per_class)
    pseudo = PseudoClasses(rows, probabilities, taken)
    place.mkdir(exist_ok=True)
    pseudo.write(place / "labels.npz", whole)
    histogram, edges = np.histogram(probabilities.max(1), bins=20, range=(0, 1))
    confidence_histogram(place / "scores.png", histogram, threshold)
    counts = {
        name: np.bincount(probabilities[chosen].argmax(1), minlength=len(whole.classes)).tolist()
        for name, chosen in (("confident", sure), ("taken", taken))
    }
    summary = {
        "threshold": threshold,
        "soft": config.soft,
        "images": len(rows),
        "confident_images": len(sure),
        "share": len(sure) / len(rows),
        "taken_images": len(taken),
        "per_class": dict(zip(whole.classes, counts["taken"], strict=True)),
        "confident_per_class": dict(zip(whole.classes, counts["confident"], strict=True)),
        **quality(pseudo, whole.labels),
        "score_counts": histogram.tolist(),
        "score_edges": edges.tolist(),
    }
    write_summary(place, summary)
    if anew:
        tell_moving(len(rows))
    else:
        tell(summary)
    return summary


def unlabelled(whole: ImageSet, rows: np.ndarray) -> np.ndarray:
    """All rows but those whose labels are used.

    Raises:
        UserError: if there are none.
    """
    others = np.setdiff1d(np.arange(len(whole)), rows)
    if not len(others):
        raise UserError(
            f"all {len(whole)} training images of {whole.name} are used with their labels, none is left to label; set"
            " label_fraction= below 1"
        )
    return others


@torch.no_grad()
def answers(network: nn.Module, images: ImageSet, data: Images, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The softmax of ``network``, in eval mode and without augmentation.

    Args:
        network: of class scores, ``(B, 3, H, W) -> (B, C)``.
        data: says which view has no augmentation, and what damaged files do.
        rows: ``(n,)``.

    Returns:
        The rows that could be read, and ``(n, C)`` float32.
    """
    weight = next(network.eval().parameters())
    found = [
        (network(x.to(weight.device, weight.dtype)).float().softmax(1).cpu().numpy(), part)
        for x, part in clean_batches(images, data.clean, rows=rows, on_error=data.on_error)
    ]
    probabilities, read = zip(*found, strict=True)
    return np.concatenate(read), np.concatenate(probabilities)


def tell(pseudo: dict) -> None:
    """The lines that pseudo-labels are announced with."""
    judged = f"; {pseudo['right']:.1%} of them are right by held-back labels" if pseudo.get("right") is not None else ""
    if judged:
        judged += f" ({pseudo['right_of_all']:.1%} of all)"
    console.print(
        f"{pseudo['confident_images']} of {pseudo['images']} images have a class of probability"
        f" {pseudo['threshold']:g} or more{judged}; the student takes {pseudo['taken_images']}"
    )
    counts = pseudo["per_class"]
    missing = [name for name, count in counts.items() if not count]
    console.print(f"images a class: {min(counts.values())} to {max(counts.values())}")
    if missing:
        console.print(f"warning: no image for {len(missing)} of {len(counts)} classes, e.g. {missing[0]}")


# Before anything is written


def check(config: DictConfig, part: DictConfig) -> int:
    """Refuse, by UserError, what would only be noticed after the teacher's training; returns the labelled images.

    Args:
        config: of self-training.
        part: of the teacher.
    """
    if config.data.name not in NAMES:
        raise UserError(f"data={config.data.name} has no classes of images; choose one of data={', data='.join(NAMES)}")
    if config.per_class is not None:
        check_numbers(config, ("per_class",), ())
        if config.teacher is not None:
            raise UserError(
                f"per_class={config.per_class} balances the labels of a fixed teacher, and a moving one labels a batch"
                " at a time; set per_class=null or teacher=null"
            )
    check_flags(config, "soft")
    confident(np.zeros((0, 1)), config.threshold)
    if config.trainer.accumulate_grad_batches != 1:
        raise UserError("task=selftrain does not accumulate gradients: set trainer.accumulate_grad_batches=1")
    seen = finetune.ready(part, [])
    images = len(seen.rows)
    if images < config.data.batch_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is more than the {images} labelled images; set data.batch_size"
            f" to at most {images}, or label_fraction= higher"
        )
    if config.self_training:
        enough(unlabelled(seen.whole, seen.rows), config.data.batch_size)
    return images
