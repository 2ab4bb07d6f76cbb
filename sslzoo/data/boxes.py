"""Sets of images with boxes by name: COCO's layout, PASCAL VOC's, and scenes that are built in."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sslzoo.data import scenes
from sslzoo.data.box_set import BoxSet
from sslzoo.data.coco import LAYOUT, read_coco
from sslzoo.data.voc import devkit, listed, read_voc, splits
from sslzoo.errors import UserError

__all__ = ["NAMES", "BoxSet", "chosen", "further", "held_back", "load_boxes", "load_unlabelled", "training_pictures"]

NAMES = ("coco", "voc", "scenes")
LABELS = ("annotations", "years", "classes", "label_fraction", "class_agnostic")  # what the labels depend on


def chosen(settings: Mapping) -> dict:
    """The arguments of ``load_boxes`` and ``load_unlabelled`` among the settings of ``conf/data``.

    Raises:
        UserError: if they are of a set without boxes.
    """
    if settings["name"] not in NAMES:
        raise UserError(f"data={settings['name']} has no boxes; choose one of data={', data='.join(NAMES)}")
    return {key: settings[key] for key in ("name", "root", "on_error", *LABELS) if key in settings}


def load_boxes(
    name: str = "scenes",
    root: str | Path | None = None,
    *,
    annotations: str = "instances",
    years: str | int = "07+12",
    classes: Sequence[str] | None = None,
    label_fraction: float = 1.0,
    class_agnostic: bool = False,
    on_error: str = "raise",
    masks: bool = False,
    segmentation: bool = False,
    seed: int = 0,
) -> tuple[BoxSet, BoxSet]:
    """The training and the validation set called ``name``.

    Args:
        name: one of ``NAMES``.
        root: where the set is; ``scenes`` needs none and is written there, or to the user's cache, at the first call.
        annotations: of ``coco``, the files ``annotations/ANNOTATIONS_{train,val}2017.json``.
        years: of ``voc``, ``2007`` (trainval and test), ``2012`` (train and val), ``07+12`` (both trainvals and test of
            2007) or, for ``segmentation``, ``2012aug`` (train with SBD's labels, and val).
        classes: of ``voc``, by label; null takes ``classes.txt`` or PASCAL's 20.
        label_fraction: part of the training images that is kept, 0 to 1; a smaller part lies in a larger one.
        class_agnostic: one class, ``object``, instead of all.
        on_error: ``raise`` at the first faulty annotation or missing picture, or ``skip`` and count them
            (``BoxSet.skipped``).
        masks: read COCO's segmentations too.
        segmentation: of ``voc``, the images that have class maps.
        seed: of the choice of ``label_fraction``.

    Raises:
        UserError: if there is no such set, or it is missing or faulty.
    """
    train, val = _whole(name, root, annotations, years, classes, on_error, masks, segmentation)
    train = train.subset(labelled_images(len(train), label_fraction, seed))
    return (train.agnostic(), val.agnostic()) if class_agnostic else (train, val)


def load_unlabelled(
    name: str = "scenes",
    root: str | Path | None = None,
    *,
    annotations: str = "instances",
    years: str | int = "07+12",
    classes: Sequence[str] | None = None,
    label_fraction: float = 1.0,
    class_agnostic: bool = False,
    on_error: str = "raise",
    segmentation: bool = False,
    seed: int = 0,
) -> BoxSet:
    """The images that self-training may label: the training images that ``label_fraction`` leaves, and unlabeled2017.

    ``scenes`` has ``scenes.unlabelled_folder()`` for the latter, if its root has none; ``segmentation`` is that of
    ``load_boxes``.

    Raises:
        UserError: if there are none.
    """
    train, _ = _whole(name, root, annotations, years, classes, on_error, masks=False, segmentation=segmentation)
    rest = np.setdiff1d(np.arange(len(train)), labelled_images(len(train), label_fraction, seed))
    parts = [train.subset(rest).unlabelled()] if len(rest) else []
    top = _more(name, root)
    if name != "voc" and (top / "unlabeled2017").is_dir():
        categories = dict(zip(train.category_ids, train.classes, strict=True))
        file = top / "annotations" / "image_info_unlabeled2017.json"
        if not file.is_file() and name == "scenes":
            file = top / "annotations" / "instances_unlabeled2017.json"
        more = read_coco(file, top / "unlabeled2017", name, False, on_error, categories)
        parts.append(more.unlabelled())
    if not parts:
        raise UserError(f"data={name} has no unlabelled images; pass data.label_fraction below 1")
    images = parts[0] if len(parts) == 1 else _joined(*parts)
    return images.agnostic() if class_agnostic else images


def held_back(
    name: str = "scenes",
    root: str | Path | None = None,
    *,
    annotations: str = "instances",
    years: str | int = "07+12",
    classes: Sequence[str] | None = None,
    label_fraction: float = 1.0,
    class_agnostic: bool = False,
    on_error: str = "raise",
    masks: bool = False,
    segmentation: bool = False,
    seed: int = 0,
) -> list[BoxSet]:
    """True labels of those images of ``load_unlabelled`` that have some: to judge pseudo-labels by, never to train on.

    The training images that ``label_fraction`` leaves, and unlabeled2017 where there is an
    ``annotations/instances_unlabeled2017.json``; ``masks`` and ``segmentation`` are those of ``load_boxes``.
    """
    train, _ = _whole(name, root, annotations, years, classes, on_error, masks, segmentation)
    rest = np.setdiff1d(np.arange(len(train)), labelled_images(len(train), label_fraction, seed))
    parts = [train.subset(rest)] if len(rest) else []
    top = _more(name, root)
    file = top / "annotations" / "instances_unlabeled2017.json"
    if name != "voc" and file.is_file():
        categories = dict(zip(train.category_ids, train.classes, strict=True))
        parts.append(read_coco(file, top / "unlabeled2017", name, masks, on_error, categories))
    return [part.agnostic() for part in parts] if class_agnostic else parts


def further(settings: Mapping, split: str, train: BoxSet, masks: bool = False) -> BoxSet:
    """Another held-out part of a set in COCO's layout, ``annotations/ANNOTATIONS_SPLIT.json`` and ``SPLIT/``.

    Args:
        settings: those of ``conf/data`` that ``train`` was loaded by.
        split: e.g. ``valseen2017``.
        train: the training images, whose classes these have too.
        masks: read the segmentations too.

    Raises:
        UserError: if there is no such part, or it is faulty.
    """
    asked = chosen(settings)
    if asked["name"] == "voc":
        raise UserError(f"task.also={split} is a part of sets in COCO's layout; leave it out, or take data=coco")
    top = _root(asked["name"], asked["root"])
    file = top / "annotations" / f"{asked.get('annotations', 'instances')}_{split}.json"
    if not file.is_file():
        raise UserError(f"task.also={split} needs {file}, and pictures in {top / split}; put them there")
    categories = None if asked["class_agnostic"] else dict(zip(train.category_ids, train.classes, strict=True))
    found = read_coco(file, top / split, asked["name"], masks, asked["on_error"], categories)
    return found.agnostic() if asked["class_agnostic"] else found


def labelled_images(count: int, fraction: float, seed: int = 0) -> np.ndarray:
    """The images of a random part, ascending; a smaller part lies in a larger one of the same seed."""
    if not 0 < fraction <= 1:
        raise UserError(f"data.label_fraction={fraction} is no fraction; give more than 0 and at most 1")
    kept = int(fraction * count + 0.5)
    if kept == 0:
        raise UserError(f"data.label_fraction={fraction} of {count} images is none; set it to at least {1 / count:.2g}")
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:kept])


def training_pictures(name: str, root: str | Path | None = None, years: str | int = "07+12") -> list[Path]:
    """The picture files pretraining may see: the training images and unlabeled2017, never those for validation."""
    top = _root(name, root)
    if name == "voc":
        kit = devkit(top)
        files = []
        for year, part in splits(years)[0]:
            pictures = kit / f"VOC{year}" / "JPEGImages"
            names = set(listed(kit, year, part))
            files += [file for file in _files(pictures) if file.stem in names]
        return files
    more = top / "unlabeled2017"
    return _files(top / "train2017") + (_files(more) if more.is_dir() else [])


def _files(pictures: Path) -> list[Path]:
    if not pictures.is_dir():
        raise UserError(f"{pictures} is no folder; {LAYOUT}")
    return sorted(file for file in pictures.iterdir() if not file.name.startswith("."))


def _root(name: str, root: str | Path | None) -> Path:
    if name not in NAMES:
        raise UserError(f"data={name} has no boxes; choose one of data={', data='.join(NAMES)}")
    if name == "scenes":
        return scenes.folder(root)
    if root is None:
        raise UserError(f"data.root is null, but data={name} needs a folder; pass data.root=PATH")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={root} is no folder; pass data.root=PATH of the one that holds the set")
    return root


def _more(name: str, root: str | Path | None) -> Path:
    """The folder of unlabeled2017."""
    top = _root(name, root)
    return scenes.unlabelled_folder() if name == "scenes" and not (top / "unlabeled2017").is_dir() else top


def _whole(
    name: str,
    root: str | Path | None,
    annotations: str,
    years: str | int,
    classes: Sequence[str] | None,
    on_error: str,
    masks: bool,
    segmentation: bool,
) -> tuple[BoxSet, BoxSet]:
    """Both splits, all of them."""
    top = _root(name, root)
    if name == "voc":
        kit = devkit(top)
        train_parts, val_parts = splits(years)
        train = read_voc(kit, train_parts, classes, segmentation, on_error)
        return train, read_voc(kit, val_parts, train.classes, segmentation, on_error)
    files = [top / "annotations" / f"{annotations}_{split}2017.json" for split in ("train", "val")]
    train = read_coco(files[0], top / "train2017", name, masks, on_error)
    categories = dict(zip(train.category_ids, train.classes, strict=True))
    return train, read_coco(files[1], top / "val2017", name, masks, on_error, categories)


def _joined(first: BoxSet, second: BoxSet) -> BoxSet:
    """Two sets without objects as one.

    Raises:
        UserError: if they share a name of an image: labels belong to names.
    """
    both = set(first.image_ids) & set(second.image_ids)
    if both:
        raise UserError(
            f"train2017 and unlabeled2017 both have an image {min(both, key=str)}, and what is said of one would be"
            " taken for the other's; number them apart"
        )
    return BoxSet(
        **{
            **vars(first),
            "image_ids": first.image_ids + second.image_ids,
            "files": first.files + second.files,
            "sizes": np.concatenate([first.sizes, second.sizes]),
            "starts": np.zeros(len(first) + len(second) + 1, np.int64),
            "skipped": first.skipped + second.skipped,
        }
    )
