"""PASCAL VOC: one XML file an image, lists of images, and pictures whose palette indices are classes and objects.

PASCAL counts pixels from 1 and names the last one; here boxes run from the left edge of their first pixel to the right
edge of their last: 1, 1, 10, 10 becomes 0, 0, 10, 10.
"""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sslzoo.data.box_set import BoxSet, Faults, gathered, repeats
from sslzoo.errors import UserError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPLITS = {  # years: (year, list) of training, of validation
    "2007": ([("2007", "trainval")], [("2007", "test")]),
    "2012": ([("2012", "train")], [("2012", "val")]),
    "2012aug": ([("2012", "trainaug")], [("2012", "val")]),  # with the class maps of SBD, 10,582 images
    "07+12": ([("2007", "trainval"), ("2012", "trainval")], [("2007", "test")]),
}
LAYOUT = "expected VOCdevkit/VOC2007/{Annotations,ImageSets,JPEGImages} in data.root, and VOC2012 likewise"


def devkit(root: Path) -> Path:
    """The folder of VOC2007 and VOC2012: ``root``, or VOCdevkit in it.

    Raises:
        UserError: if there is neither.
    """
    for folder in (root / "VOCdevkit", root):
        if any(folder.glob("VOC2*")):
            return folder
    raise UserError(f"data.root={root} has no VOC2007 or VOC2012; {LAYOUT}")


def splits(years: str | int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The lists that training and validation take, as (year, list)."""
    if str(years) not in SPLITS:
        raise UserError(f"data.years={years} is none of {', '.join(SPLITS)}")
    return SPLITS[str(years)]


def listed(kit: Path, year: str, part: str, segmentation: bool = False) -> list[str]:
    """The images of a list, e.g. ``trainval``: names without suffix."""
    file = kit / f"VOC{year}" / "ImageSets" / ("Segmentation" if segmentation else "Main") / f"{part}.txt"
    if not file.is_file():
        raise UserError(f"{file} is no file; {LAYOUT}, or choose other data.years")
    names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    if not names:
        raise UserError(f"{file} lists no images; one name a line is expected")
    return names


def class_names(kit: Path, year: str, given: Sequence[str] | None) -> list[str]:
    """The classes: as given, else as ``classes.txt`` beside the annotations lists them, else PASCAL's 20."""
    file = kit / f"VOC{year}" / "classes.txt"
    if given:
        names = list(map(str, given))
    elif file.is_file():
        names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    else:
        return list(CLASSES)
    names = [name for name in names if name not in ("background", "__background__")]
    if len(set(names)) < len(names):
        raise UserError(f"{'data.classes' if given else file} names a class twice: {', '.join(names)}")
    return names


def read_voc(
    kit: Path,
    parts: Sequence[tuple[str, str]],
    classes: Sequence[str] | None = None,
    segmentation: bool = False,
    on_error: str = "raise",
) -> BoxSet:
    """Read some lists of images with their boxes.

    Args:
        kit: VOCdevkit.
        parts: years and lists, e.g. ``[("2007", "trainval"), ("2012", "trainval")]``.
        classes: null takes ``classes.txt`` or PASCAL's 20.
        segmentation: take the lists of the images that have class and object maps.
        on_error: ``raise`` at the first fault, or ``skip`` what is faulty and count it.

    Raises:
        UserError: on files that are missing or not VOC's, and on faults. The line names the file and the object.
    """
    faults = Faults(on_error)
    names = class_names(kit, parts[0][0], classes)
    label_of = {name: label for label, name in enumerate(names, start=1)}
    entries = [(kit / f"VOC{year}", name) for year, part in parts for name in listed(kit, year, part, segmentation)]
    kept_images = faults.sound(
        repeats(entries),
        "image listed twice",
        lambda k: f"{entries[k][0]} lists image {entries[k][1]} twice; remove one line",
    )
    pictures = {folder: _stems(folder / "JPEGImages") for folder in dict.fromkeys(folder for folder, _ in entries)}
    missing = np.array([name not in pictures[folder] for folder, name in entries], bool)
    kept_images &= faults.sound(
        missing,
        "missing picture",
        lambda k: f"{entries[k][0] / 'JPEGImages'} has no picture {entries[k][1]}, which a list names; put it there",
    )

    sizes = np.zeros((len(entries), 2), np.int64)
    objects: list[tuple[str, float, float, float, float, bool]] = []
    of: list[int] = []
    place: list[int] = []
    for k, (folder, name) in enumerate(entries):
        if not kept_images[k]:
            continue
        sizes[k], found = _annotation(folder / "Annotations" / f"{name}.xml")
        objects += found
        of += [k] * len(found)
        place += range(1, len(found) + 1)

    def called(k: int) -> str:
        folder, name = entries[of[k]]
        return f"{folder / 'Annotations' / name}.xml: object {place[k]} ({objects[k][0]})"

    labels = np.array([label_of.get(entry[0], 0) for entry in objects], np.int64)
    kept = faults.sound(
        labels == 0,
        "unknown class",
        lambda k: f"{called(k)} is of no known class; name it in data.classes=[...]",
    )
    corners = np.array([entry[1:5] for entry in objects], float).reshape(-1, 4)
    corners[:, :2] -= 1
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    of_image = np.array(of, np.int64)
    kept &= faults.sound_boxes(xywh, sizes[of_image], called)
    maps_of = {}
    for kind in ("SegmentationClass", "SegmentationObject"):
        there = {folder: _stems(folder / kind, optional=True) for folder in pictures}
        if kind == "SegmentationClass" and any(part == "trainaug" for _, part in parts):
            there = {folder: maps | _stems(folder / f"{kind}Aug", optional=True) for folder, maps in there.items()}
        maps_of[kind] = [there[folder].get(name) for folder, name in entries]
    if segmentation:
        lacking = np.array([found is None for found in maps_of["SegmentationClass"]], bool)
        kept_images &= faults.sound(
            lacking,
            "missing class map",
            lambda k: f"{entries[k][0] / 'SegmentationClass'} has no map of image {entries[k][1]}; put it there",
        )

    # A map of objects numbers them as the XML does; where an object was left out the numbers would be off.
    whole = np.ones(len(entries), bool)
    whole[of_image[~kept]] = False
    rows, starts = gathered(kept_images, of_image, kept)
    places = np.flatnonzero(kept_images).tolist()
    if not places:
        raise UserError(
            f"{kit}: none of its {len(entries)} images can be used; see the errors with data.on_error=raise"
        )
    return BoxSet(
        name="voc",
        classes=names,
        category_ids=list(range(1, len(names) + 1)),
        image_ids=[entries[k][1] for k in places],
        files=[pictures[entries[k][0]][entries[k][1]] for k in places],
        sizes=sizes[kept_images],
        starts=starts,
        xywh=xywh[rows],
        labels=labels[rows],
        areas=xywh[rows, 2] * xywh[rows, 3],
        crowd=np.zeros(len(rows), bool),
        difficult=np.array([objects[k][5] for k in rows.tolist()], bool),
        class_maps=[maps_of["SegmentationClass"][k] for k in places],
        object_maps=[maps_of["SegmentationObject"][k] if whole[k] else None for k in places],
        skipped=faults.skipped,
    )


def _stems(folder: Path, optional: bool = False) -> dict[str, Path]:
    """The files of a folder by their names without suffix."""
    if not folder.is_dir():
        if optional:
            return {}
        raise UserError(f"{folder} is no folder; {LAYOUT}")
    return {file.stem: file for file in sorted(folder.iterdir()) if not file.name.startswith(".")}


def _annotation(file: Path) -> tuple[tuple[int, int], list[tuple[str, float, float, float, float, bool]]]:
    """Height and width, and each object's class, xmin, ymin, xmax, ymax and difficult."""
    try:
        root = ElementTree.parse(file).getroot()
    except FileNotFoundError:
        raise UserError(f"{file} is no file, but a list names its image; {LAYOUT}") from None
    except ElementTree.ParseError as error:
        raise UserError(f"{file} is not XML ({error}); it may be cut short, fetch it again") from error
    try:
        size = int(root.findtext("size/height")), int(root.findtext("size/width"))
        found = []
        for entry in root.iter("object"):
            box = entry.find("bndbox")
            corners = [float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")]
            found.append((entry.findtext("name").strip(), *corners, int(entry.findtext("difficult") or 0) == 1))
    except (TypeError, ValueError, AttributeError):
        raise UserError(
            f"{file} is not PASCAL's: it needs size/height, size/width, and a name and a bndbox of four numbers for "
            "every object; fix it"
        ) from None
    return size, found
