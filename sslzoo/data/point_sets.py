"""Sets with keypoints by name: those with boxes that have some, and faces."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sslzoo.data import boxes
from sslzoo.data.box_set import BoxSet, gathered
from sslzoo.data.faces import load_faces
from sslzoo.data.points import PointSet, objects
from sslzoo.errors import UserError

NAMES = ("scenes", "coco", "faces")


def load_points(settings: Mapping, seed: int = 0) -> tuple[PointSet, PointSet]:
    """The training and the held-out objects that ``settings`` of ``conf/data`` describe.

    Args:
        settings: ``name``, ``root`` and what else ``load_boxes`` or ``load_faces`` takes; the rest is left.
        seed: of the choice of ``label_fraction``.

    Raises:
        UserError: if it is no set with keypoints, or it is missing or faulty.
    """
    if settings["name"] == "faces":
        wanted = ("root", "held_out", "label_fraction", "on_error")
        return load_faces(**{name: settings[name] for name in wanted}, seed=seed)
    train, val = _with_keypoints(settings, seed)
    return objects(train), objects(val)


def load_with_points(settings: Mapping, seed: int = 0) -> tuple[BoxSet, BoxSet]:
    """The training and the held-out images with the objects of the classes that have keypoints, as one class.

    Training leaves out images of which no object has a labelled point, as detectron2 does.

    Args:
        settings, seed: see ``load_points``.

    Raises:
        UserError: if it is no set with boxes and keypoints, or it is missing or faulty.
    """
    if settings["name"] == "faces":
        raise UserError("data=faces has no boxes; for task.model=keypoint_rcnn choose data=scenes or data=coco")
    train, val = _with_keypoints(settings, seed)
    classes = classes_with_points(train)
    train, val = with_points(train, classes), with_points(val, classes)
    image = np.repeat(np.arange(len(train)), np.diff(train.starts))
    labelled = (train.keypoints[..., 2] > 0).any(1) & ~train.crowd
    return train.subset(np.unique(image[labelled])), val


def _with_keypoints(settings: Mapping, seed: int) -> tuple[BoxSet, BoxSet]:
    if settings["name"] not in NAMES:
        raise UserError(f"data={settings['name']} has no keypoints; choose one of data={', data='.join(NAMES)}")
    train, val = boxes.load_boxes(**boxes.chosen(settings), seed=seed)
    check_points(train, "training")
    check_points(val, "held-out")
    return train, val


def check_points(images: BoxSet, split: str) -> None:
    """Refuse, by UserError, a set in which no point is labelled."""
    if images.keypoints is None:
        raise UserError(
            f"data={images.name} has no keypoints; choose data that has some: data=scenes, data=faces, or data=coco"
            " data.annotations=person_keypoints"
        )
    if not (images.keypoints[~images.crowd][..., 2] > 0).any():
        raise UserError(
            f"all keypoints of the {split} images of data={images.name} are missing; choose data with labelled ones"
        )


def with_points(images: BoxSet, classes: Sequence[str]) -> BoxSet:
    """The same images with the objects of these classes only, as one class: what Keypoint R-CNN looks for."""
    wanted = np.array([name in classes for name in images.classes])[images.labels - 1]
    of = np.repeat(np.arange(len(images)), np.diff(images.starts))
    rows, starts = gathered(np.ones(len(images), bool), of, wanted)
    kept = {column: getattr(images, column)[rows] for column in ("xywh", "areas", "crowd", "difficult", "keypoints")}
    name = classes[0] if len(classes) == 1 else "object"
    return replace(
        images,
        **kept,
        starts=starts,
        classes=[name],
        category_ids=[images.category_ids[images.classes.index(name)] if len(classes) == 1 else 1],
        labels=np.ones(len(rows), np.int64),
        segmentations=None if images.segmentations is None else [images.segmentations[k] for k in rows.tolist()],
    )


def classes_with_points(images: BoxSet) -> list[str]:
    """Names of the classes of which some object has a labelled point."""
    labels = np.unique(images.labels[(images.keypoints[..., 2] > 0).any(1)])
    return [images.classes[label - 1] for label in labels.tolist()]
