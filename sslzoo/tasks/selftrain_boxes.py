"""Self-training of detectors: what a part learns from, and how a teacher's run finds objects in unlabelled images."""

import math
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from sslzoo.config import plain
from sslzoo.data.box_set import BoxSet
from sslzoo.data.boxes import chosen, held_back, load_unlabelled
from sslzoo.data.pseudo_labels import quality
from sslzoo.downstream.detection import Detection, predict
from sslzoo.errors import UserError
from sslzoo.report.detections import predictions
from sslzoo.report.progress import console
from sslzoo.report.pseudo import score_histogram
from sslzoo.selftrain import MATCH_DENSITY, check_threshold, select
from sslzoo.tasks import detect
from sslzoo.tasks.dense import held_out
from sslzoo.tasks.joint import jointly
from sslzoo.tasks.parts import (
    SET_HERE,
    at_most,
    averaged_weights,
    enough,
    how_sure,
    teacher_of,
    tell_moving,
    trained_weights,
)
from sslzoo.tasks.runs import backbone_and_config, write_summary

SETTINGS = "selftrain"  # its file in conf/task
SCORE, NAME = "map", "AP"  # of a whole run, and in tables
PART_SCORE = "map"
INSTEAD = "augment"  # of pretraining's views
GIVEN = SET_HERE | {"task.augment": "augment", "task.alpha": "alpha"}


def check(config: DictConfig, part: DictConfig) -> int:
    """Refuse, by UserError, what would only be noticed after the teacher's training; returns the labelled images.

    Args:
        config: of self-training.
        part: of the teacher.
    """
    detect.check(part, [])
    masks = detect.with_masks(config)
    train, val = detect.load_sets(config, masks)
    detect.load_further(part, train, masks)
    data = detect.load_data(part, train, val, masks)
    if config.self_training:
        check_threshold(config.threshold)
        enough(unlabelled(config), config.data.batch_size)
    encoder, sized = backbone_and_config(part)
    jointly(sized, Detection(detect.build_detector(sized, encoder, len(train.classes))), data)
    return len(train)


def learned(config: DictConfig, place: Path) -> dict:
    """Settings of ``task`` for a student that learns from the labels in ``place``."""
    return {"pseudo": str(place / "labels.json"), "teacher": teacher_of(config)}


def told(part: dict) -> dict:
    """What of a part's own summary goes into the run's."""
    names = ("map", "map_50", "map_75", "mask_map", "mask_map_50", "also", "steps", "images_seen", "train_images",
             "seconds", "loss", "start", "teacher")  # fmt: skip
    return {name: part.get(name) for name in names}


def labelled(config: DictConfig, teacher: Path, place: Path, averaged: bool = False) -> dict:
    """Make pseudo-labels in ``place`` with the run ``teacher``, and say what they are.

    Args:
        config: of self-training.
        averaged: label with the moving teacher of that run instead, at its end.

    Raises:
        UserError: if too few images have a box for one batch.
    """
    train, _ = detect.load_sets(config, detect.with_masks(config))
    threshold, anew = how_sure(config, averaged)
    learner = load_learner(teacher, len(train.classes))
    if averaged:
        learner.detector.load_state_dict(averaged_weights(teacher)[0])
    images = unlabelled(config)
    console.print(f"labelling {len(images)} images of {images.name} with {teacher}")
    found = predict(learner, images)
    density = float((~train.crowd).sum()) / len(train)
    pseudo = select(images, found, threshold, density)
    scores = np.concatenate([each["scores"].double().numpy() for each in found])
    usable = len(pseudo.with_boxes())
    if usable < config.data.batch_size and config.teacher is None:
        best = f"the best score is {scores.max():.2f}" if len(scores) else "nothing was found at all"
        raise UserError(
            f"only {usable} of {len(images)} unlabelled images have a box of score {pseudo.threshold:.3g} or more, and"
            f" a batch takes {config.data.batch_size} ({best}): the teacher is too unsure;"
            f" set threshold={MATCH_DENSITY} or a lower threshold, or train longer with steps="
        )
    settings = chosen(plain(config.data))
    truth = held_back(**settings, segmentation=detect.with_masks(config), seed=config.seed)
    place.mkdir(exist_ok=True)
    pseudo.write(place / "labels.json")
    score_histogram(place / "scores.png", scores, pseudo.threshold, pseudo.density, density)
    row = {name: k for k, name in enumerate(images.image_ids)}
    shown = next((part for part in truth if row.keys() & set(part.image_ids)), images)
    kept = [k for k, name in enumerate(shown.image_ids) if name in row]
    predictions(
        place / "boxes.png",
        shown.subset(np.array(kept)),
        [found[row[shown.image_ids[k]]] for k in kept],
        f"pseudo-labels of {images.name}, init {config.init}, {config.label_fraction:.0%} of the labels",
        least=math.floor(1000 * pseudo.threshold) / 1000,  # as it is written on the picture
    )
    counts, edges = np.histogram(scores, bins=20, range=(0, 1))
    summary = {
        "threshold": pseudo.threshold,
        "asked": threshold,
        "images": len(images),
        "images_with_boxes": usable,
        "boxes": len(pseudo.scores),
        "boxes_per_image": pseudo.density,
        "labelled_boxes_per_image": density,
        "empty": pseudo.empty,
        "low_density": not anew and pseudo.density < density / 2,
        **quality(pseudo, truth),
        "score_counts": counts.tolist(),
        "score_edges": edges.tolist(),
    }
    write_summary(place, summary)
    if anew:
        tell_moving(len(images))
    else:
        tell(summary)
    return summary


def tell(pseudo: dict) -> None:
    """The lines that pseudo-labels are announced with."""
    judged = ""
    if "precision" in pseudo:
        judged = f"; precision {pseudo['precision']:.2f}, recall {pseudo['recall']:.2f} of held-back labels"
    console.print(
        f"{pseudo['boxes_per_image']:.2f} pseudo-boxes an image at score {pseudo['threshold']:.3g}, labelled images"
        f" have {pseudo['labelled_boxes_per_image']:.2f}; {pseudo['empty']:.0%} of the images have none and are left"
        f" out{judged}"
    )
    if pseudo["low_density"]:
        console.print(
            "warning: that is under half of the labelled density, so the student is taught to overlook objects; a young"
            f" focal detector is rarely sure: threshold={MATCH_DENSITY}, a lower threshold, or more steps help"
        )


def unlabelled(config: DictConfig) -> BoxSet:
    """The images to label that can be read, of ``config.unlabelled_images`` at most."""
    settings = chosen(plain(config.data))
    images = load_unlabelled(**settings, segmentation=detect.with_masks(config), seed=config.seed)
    return held_out(at_most(config.unlabelled_images, images, config.seed), config.data.on_error)


def load_learner(run_dir: Path, classes: int) -> Detection:
    """The detector that a run of ``task=detect`` has trained, in eval mode."""
    config = OmegaConf.load(run_dir / "config.yaml")
    encoder, sized = backbone_and_config(config)
    learner = Detection(detect.build_detector(sized, encoder, classes))
    learner.load_state_dict(trained_weights(run_dir))
    return learner.eval()
