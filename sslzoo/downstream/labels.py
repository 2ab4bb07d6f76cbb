"""What an evaluation asks of a labelled set, said before any work is done."""

import logging
from pathlib import Path

import numpy as np

from sslzoo.data.images import ImageSet
from sslzoo.data.subsets import labelled, part
from sslzoo.errors import UserError

log = logging.getLogger(__name__)


def labelled_rows(task: str, train: ImageSet, val: ImageSet | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the held-out set that have a label.

    Training classes of which no image is held out are named in the log: nothing is measured of them.

    Raises:
        UserError: without labels on both sides, with a single class, or with a held-out class that is not trained.
    """
    known = [np.flatnonzero(images.labels >= 0) if images is not None else np.arange(0) for images in (train, val)]
    if val is None or not all(map(len, known)):
        where = "training" if not len(known[0]) else "held-out"
        raise UserError(f"task={task} needs labelled training and held-out images; {train.name} has no {where} labels")
    learnt, asked = (np.unique(images.labels[rows]) for images, rows in zip((train, val), known, strict=True))
    if len(learnt) < 2:
        raise UserError(
            f"task={task} needs two classes or more; all {len(known[0])} training images of {train.name} are of"
            f" {_names(train, learnt)}"
        )
    new = np.setdiff1d(asked, learnt)
    if len(new):
        raise UserError(
            f"{train.name} has {_classes(new)} among its held-out images that no training image shows"
            f" ({_names(val, new)}); task={task} cannot learn them: remove them, or add training images"
        )
    unasked = np.setdiff1d(learnt, asked)
    if len(unasked):
        log.warning(
            "%s has no held-out images of %s (%s): nothing is measured there",
            train.name,
            _classes(unasked),
            _names(train, unasked),
        )
    return known[0], known[1]


def labelled_images(
    task: str,
    train: ImageSet,
    val: ImageSet | None,
    fraction: float = 1.0,
    label_list: str | Path | None = None,
    seed: int = 0,
) -> tuple[ImageSet, ImageSet]:
    """The training images whose labels may be used (see ``labelled``), and the held-out images that have one.

    Raises:
        UserError: see ``labelled_rows`` and ``labelled``.
    """
    known, asked = labelled_rows(task, train, val)
    assert val is not None  # or the line above had refused
    if fraction != 1 or label_list is not None:
        known = labelled(train, fraction, label_list, seed)
        labelled_rows(task, part(train, known), val)
    return _part(train, known), _part(val, asked)


def _part(images: ImageSet, rows: np.ndarray) -> ImageSet:
    return images if len(rows) == len(images) else part(images, rows)


def _classes(labels: np.ndarray) -> str:
    return "1 class" if len(labels) == 1 else f"{len(labels)} classes"


def _names(images: ImageSet, labels: np.ndarray, limit: int = 5) -> str:
    named = [images.classes[label] if label < len(images.classes) else f"class {label}" for label in labels.tolist()]
    return ", ".join(named[:limit]) + (", ..." if len(named) > limit else "")
