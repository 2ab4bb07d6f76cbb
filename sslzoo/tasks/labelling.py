"""The part of self-training that labels: a teacher's run finds objects in images without labels."""

import json
import math
from pathlib import Path

import numpy as np
import torch
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
from sslzoo.selftrain import MATCH_DENSITY, select
from sslzoo.tasks import detect
from sslzoo.tasks.runs import backbone_and_config, write_summary


def labelled(config: DictConfig, train: BoxSet, teacher: Path, place: Path) -> dict:
    """What is said of the pseudo-labels in ``place``, made now by the run ``teacher`` unless they are there.

    Raises:
        UserError: if too few images have a box for one batch.
    """
    done = place / "summary.json"
    if done.is_file():
        return json.loads(done.read_text())
    learner = load_learner(teacher, len(train.classes))
    images = unlabelled(config)
    console.print(f"labelling {len(images)} images of {images.name} with {teacher}")
    found = predict(learner, images)
    density = float((~train.crowd).sum()) / len(train)
    pseudo = select(images, found, config.threshold, density)
    scores = np.concatenate([each["scores"].double().numpy() for each in found])
    usable = len(pseudo.with_boxes())
    if usable < config.data.batch_size:
        best = f"the best score is {scores.max():.2f}" if len(scores) else "nothing was found at all"
        raise UserError(
            f"only {usable} of {len(images)} unlabelled images have a box of score {pseudo.threshold:.3g} or more, and"
            f" a batch takes {config.data.batch_size} ({best}): the teacher is too unsure;"
            f" set threshold={MATCH_DENSITY} or a lower threshold, or train longer with steps="
        )
    settings = chosen(plain(config.data))
    truth = held_back(**settings, seed=config.seed)
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
        "asked": config.threshold,
        "images": len(images),
        "images_with_boxes": usable,
        "boxes": len(pseudo.scores),
        "boxes_per_image": pseudo.density,
        "labelled_boxes_per_image": density,
        "empty": pseudo.empty,
        "low_density": pseudo.density < density / 2,
        **quality(pseudo, truth),
        "score_counts": counts.tolist(),
        "score_edges": edges.tolist(),
    }
    write_summary(place, summary)
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
    """The images to label, ``config.unlabelled_images`` of them at most; fewer lie among more."""
    images = load_unlabelled(**chosen(plain(config.data)), seed=config.seed)
    limit = config.unlabelled_images
    if limit is None or limit >= len(images):
        return images
    order = np.random.default_rng([config.seed, len(images)]).permutation(len(images))
    return images.subset(np.sort(order[:limit]))


def load_learner(run_dir: Path, classes: int) -> Detection:
    """The detector that a run of ``task=detect`` has trained, in eval mode."""
    config = OmegaConf.load(run_dir / "config.yaml")
    encoder, sized = backbone_and_config(config)
    learner = Detection(detect.build_detector(sized, encoder, classes))
    state = torch.load(run_dir / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    while any(name.startswith("learner.") for name in state):  # of a student, of joint training, or of both
        state = {name.removeprefix("learner."): value for name, value in state.items() if name.startswith("learner.")}
    learner.load_state_dict(state)
    return learner.eval()
