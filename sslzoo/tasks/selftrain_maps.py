"""Self-training of segmenters: what a part learns from, and how a teacher's run draws class maps of other images.

A pixel whose most probable class has less than ``threshold`` becomes 255, and carries no gradient; the teacher looks at
every image in several scales (Zoph et al. 2020, appendix).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from sslzoo.config import plain
from sslzoo.data.box_module import clean_pictures
from sslzoo.data.box_set import IGNORE
from sslzoo.data.maps import MapSet, held_back_maps, load_maps, load_unlabelled_maps
from sslzoo.data.pseudo_maps import PseudoMaps
from sslzoo.downstream.segmentation import Segmentation, class_map, confusion, probabilities, scores
from sslzoo.errors import UserError
from sslzoo.report.class_maps import predictions, some_rows, write_map
from sslzoo.report.progress import console
from sslzoo.report.pseudo import confidence_histogram
from sslzoo.selftrain import check_probability
from sslzoo.tasks import segment
from sslzoo.tasks.dense import held_out
from sslzoo.tasks.parts import (
    SET_HERE,
    at_most,
    averaged_weights,
    check_flags,
    enough,
    how_sure,
    teacher_of,
    tell_moving,
    trained_weights,
)
from sslzoo.tasks.runs import backbone_and_config, device, write_summary

SETTINGS = "selftrain_maps"  # its file in conf/task
SCORE, NAME = "miou", "mIoU"  # of a whole run, and in tables
PART_SCORE = "miou"
INSTEAD = "augment"  # of pretraining's views
GIVEN = SET_HERE | {"task.augment": "augment", "task.alpha": "alpha"}
BINS = 20  # of the histogram of probabilities


def check(config: DictConfig, part: DictConfig) -> int:
    """Refuse, by UserError, what would only be noticed after the teacher's training; returns the labelled images.

    Args:
        config: of self-training.
        part: of the teacher.
    """
    segment.check(part, [])
    check_probability("threshold", config.threshold)
    segment.check_scales("teacher_scales", config.teacher_scales)
    check_flags(config, "teacher_flip")
    train, val = segment.load_sets(part)
    segment.batches(part, train, val)
    if config.self_training:
        images = unlabelled(config)
        enough(images, config.data.batch_size)
        segment.batches(part, images, val)
    encoder, sized = backbone_and_config(part)
    segment.build_learner(sized, encoder, len(train.map_classes))
    return len(train)


def learned(config: DictConfig, place: Path) -> dict:
    """Settings of ``task`` for a student that learns from the labels in ``place``."""
    return {"pseudo": str(place / "maps"), "teacher": teacher_of(config)}


def told(part: dict) -> dict:
    """What of a part's own summary goes into the run's."""
    names = ("miou", "pixel_accuracy", "steps", "images_seen", "train_images", "seconds", "loss", "start", "teacher")
    return {name: part.get(name) for name in names}


def labelled(config: DictConfig, teacher: Path, place: Path, averaged: bool = False) -> dict:
    """Make pseudo-labels in ``place`` with the run ``teacher``, and say what they are.

    Args:
        config: of self-training.
        averaged: label with the moving teacher of that run instead, at its end.

    Raises:
        UserError: if too few images have a pixel that the teacher is sure of for one batch.
    """
    images = unlabelled(config)
    truth = held_back_maps(plain(config.data), config.seed)
    console.print(f"labelling {len(images)} images of {images.name} with {teacher}")
    threshold, anew = how_sure(config, averaged)
    learner = load_learner(teacher, len(images.map_classes)).to(device(config)[0])
    if averaged:
        learner.segmenter.load_state_dict(averaged_weights(teacher)[0])
    (place / "maps").mkdir(parents=True, exist_ok=True)
    histogram, counts = torch.zeros(BINS, dtype=torch.long), torch.zeros(IGNORE + 1, dtype=torch.long)
    usable = 0
    for name, picture in zip(images.image_ids, clean_pictures(images, np.arange(len(images))), strict=True):
        said = probabilities(learner, picture, list(config.teacher_scales), config.teacher_flip)
        found = class_map(said, threshold).cpu()
        histogram += said.amax(0).float().cpu().histc(BINS, 0, 1).long()
        counts += found.flatten().long().bincount(minlength=len(counts))
        sure = bool((found != IGNORE).any())
        usable += sure
        if sure or anew:
            write_map(place / "maps" / f"{name}.png", found)
    if usable < config.data.batch_size and config.teacher is None:
        raise UserError(
            f"only {usable} of {len(images)} unlabelled images have a pixel of probability {threshold:g} or"
            f" more, and a batch takes {config.data.batch_size}: the teacher is too unsure; set a lower threshold, or"
            " train longer with steps="
        )
    maps = PseudoMaps.read(place / "maps", images)
    confidence_histogram(place / "scores.png", histogram.numpy(), threshold)
    title = f"pseudo-labels of {images.name}, init {config.init}, {config.label_fraction:.0%} of the labels"
    picture_some(place / "maps.png", maps, truth, title)
    shares = (counts / counts.sum()).tolist()
    summary = {
        "threshold": threshold,
        "images": len(images),
        "images_with_pixels": usable,
        "labelled_pixels": 1 - shares[IGNORE],
        "class_pixels": dict(zip(images.map_classes, shares, strict=False)),
        "labelled_class_pixels": class_shares(load_maps(plain(config.data), config.seed)[0]),
        **quality(maps, truth),
        "score_counts": histogram.tolist(),
        "score_edges": np.linspace(0, 1, BINS + 1).tolist(),
    }
    write_summary(place, summary)
    if anew:
        tell_moving(len(images))
    else:
        tell(summary)
    return summary


def picture_some(path: Path, maps: PseudoMaps, truth: Sequence[MapSet], title: str) -> None:
    """Some photographs with their true maps, where these are known, and their pseudo-labels."""
    of = {name: row for row, name in enumerate(maps.image_ids)}
    known = ((each, np.flatnonzero([name in of for name in each.image_ids])) for each in truth)
    shown, there = next((each for each in known if len(each[1])), (maps, np.arange(len(maps))))
    rows = there[some_rows(there)]
    predictions(path, shown, rows, [maps.class_map(of[shown.image_ids[row]]) for row in rows], title)


def class_shares(images: MapSet) -> dict[str, float]:
    """What part of all pixels each class has."""
    counts = sum(images.class_map(row).flatten().long().bincount(minlength=IGNORE + 1) for row in range(len(images)))
    return dict(zip(images.map_classes, (counts / counts.sum()).tolist(), strict=False))


def quality(pseudo: PseudoMaps, truth: Sequence[MapSet]) -> dict[str, float | int]:
    """How good the maps of those images are whose labels were held back.

    Args:
        pseudo: of N images.
        truth: sets with the true maps of some of them, by ``image_ids``.

    Returns:
        ``right``, the share of the labelled pixels that have their true class; ``recall``, the same of all pixels;
        ``miou``, in which unlabelled pixels are wrong; ``judged_images``. Empty if there are none.
    """
    row = {name: k for k, name in enumerate(pseudo.image_ids)}
    counts, judged = torch.zeros(len(pseudo.map_classes), len(pseudo.map_classes) + 1, dtype=torch.long), 0
    for known in truth:
        rows = np.array([k for k, name in enumerate(known.image_ids) if name in row], int)
        counts += confusion(known, rows, map(pseudo.class_map, [row[known.image_ids[k]] for k in rows]))
        judged += len(rows)
    if not judged:
        return {}
    right, answered = counts.diagonal().sum(), counts[:, : len(counts)].sum()
    return {
        "right": float(right / answered.clamp(min=1)),
        "recall": float(right / counts.sum().clamp(min=1)),
        "miou": scores(counts, pseudo.map_classes)["miou"],
        "judged_images": judged,
    }


def tell(pseudo: dict) -> None:
    """The lines that pseudo-labels are announced with."""
    judged = ""
    if "right" in pseudo:
        judged = f"; {pseudo['right']:.1%} of them are right by held-back labels, mIoU {100 * pseudo['miou']:.1f}"
    console.print(f"{pseudo['labelled_pixels']:.1%} of the pixels have a class of probability"
                  f" {pseudo['threshold']:g} or more{judged}", markup=False)  # fmt: skip
    rare = [
        name
        for name, share in pseudo["labelled_class_pixels"].items()
        if pseudo["class_pixels"].get(name, 0) < share / 2
    ]
    if rare:
        console.print(
            f"warning: {len(rare)} of {len(pseudo['class_pixels'])} classes have under half of the pixels they have in"
            f" the labels, e.g. {rare[0]}, so the student is taught to overlook them; a lower threshold, or more steps"
            " help"
        )


def unlabelled(config: DictConfig) -> MapSet:
    """The images to label that can be read, of ``config.unlabelled_images`` at most."""
    images = load_unlabelled_maps(plain(config.data), config.seed)
    return held_out(at_most(config.unlabelled_images, images, config.seed), config.data.on_error)


def load_learner(run_dir: Path, classes: int) -> Segmentation:
    """The segmenter that a run of ``task=segment`` has trained, in eval mode."""
    config = OmegaConf.load(run_dir / "config.yaml")
    encoder, sized = backbone_and_config(config)
    learner = segment.build_learner(sized, encoder, classes)
    learner.load_state_dict(trained_weights(run_dir))
    return learner.eval()
