"""COCO's annotation files: instances or person keypoints, of any categories.

An annotation's category keeps its id; its label is the rank of that id among the categories, from 1. Boxes without an
area and boxes that leave their image by more than a pixel are faults, and so is whatever refers to nothing. COCO's own
files have a few boxes without an area.
"""

import gc
import json
import os
from pathlib import Path

import numpy as np

from sslzoo.data.box_set import BoxSet, Faults, gathered, repeats
from sslzoo.errors import UserError

LAYOUT = "expected annotations/instances_{train,val}2017.json, train2017/ and val2017/ in data.root"


def read_coco(
    file: Path,
    pictures: Path,
    name: str = "coco",
    masks: bool = False,
    on_error: str = "raise",
    categories: dict[int, str] | None = None,
) -> BoxSet:
    """Read one annotation file.

    Args:
        file: the JSON; without annotations (``image_info_*``) every image is empty.
        pictures: the folder of its images.
        name: of the set.
        masks: read segmentations too; those of COCO's training set take gigabytes.
        on_error: ``raise`` at the first fault, or ``skip`` what is faulty and count it.
        categories: of the training set, by id, where this is another file; it may lack some, but have no others.

    Raises:
        UserError: on a file that is missing or not COCO's, and on faults. The line names the file and the id.
    """
    faults = Faults(on_error)
    content = _content(file)
    images, annotations = content["images"], content.get("annotations", [])
    own = _categories(file, content.get("categories", []))
    if categories is not None:
        _match(file, own, categories)
    categories = own if categories is None else categories
    ids = sorted(categories)

    image_ids = _column(images, "id", file, "image")
    names = list(map(str, _column(images, "file_name", file, "image")))
    sizes = np.stack([_numbers(images, key, file, "image") for key in ("height", "width")], axis=1).astype(np.int64)
    kept_images = _sound_images(faults, file, pictures, image_ids, names)

    row = {image: k for k, image in reversed(list(enumerate(image_ids)))}  # of an image listed twice, the first
    rank = {category: label for label, category in enumerate(ids, start=1)}
    own_ids = _column(annotations, "id", file, "annotation")
    image_of = _column(annotations, "image_id", file, "annotation")
    category_of = _column(annotations, "category_id", file, "annotation")
    of = np.array([row.get(image, -1) for image in image_of], np.int64)
    labels = np.array([rank.get(category, 0) for category in category_of], np.int64)
    xywh = _numbers(annotations, "bbox", file, "annotation", width=4)
    crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], bool)
    given = [annotation.get("area") for annotation in annotations]
    areas = np.array([area if isinstance(area, int | float) else np.nan for area in given], float)
    areas = np.where(np.isnan(areas), xywh[:, 2] * xywh[:, 3], areas)

    def called(k: int) -> str:
        return f"{file}: annotation {own_ids[k]}"

    kept = faults.sound(
        of < 0,
        "annotation of no image",
        lambda k: f"{called(k)} is of image {image_of[k]}, which the file does not list; remove it or list the image",
    )
    kept &= faults.sound(
        labels == 0,
        "unknown category",
        lambda k: f"{called(k)} has category_id {category_of[k]}, which is none of the categories; add it there",
    )
    of = np.maximum(of, 0)
    kept &= faults.sound_boxes(xywh, sizes[of], called)
    segmentations = None
    if masks:
        segmentations = [annotation.get("segmentation") for annotation in annotations]
        reasons = mask_faults(segmentations, sizes[of])
        kept &= faults.sound(
            np.array([reason is not None for reason in reasons], bool),
            "mask",
            lambda k: f"{called(k)}: its mask {reasons[k]}; fix it",
        )
    names_of_points = _keypoint_names(file, content.get("categories", []))
    keypoints, bad_points = _keypoints(annotations, len(names_of_points))
    kept &= faults.sound(
        bad_points,
        "keypoints",
        lambda k: f"{called(k)}: its keypoints are not {len(names_of_points)} times x, y, visibility; fix them",
    )

    rows, starts = gathered(kept_images, of, kept)
    places = np.flatnonzero(kept_images).tolist()
    if not places:
        raise UserError(f"{file}: none of its {len(names)} images can be used; see the errors with data.on_error=raise")
    return BoxSet(
        name=name,
        classes=[categories[category] for category in ids],
        category_ids=ids,
        image_ids=[image_ids[k] for k in places],
        files=[pictures / names[k] for k in places],
        sizes=sizes[kept_images],
        starts=starts,
        xywh=xywh[rows],
        labels=labels[rows],
        areas=areas[rows],
        crowd=crowd[rows],
        difficult=np.zeros(len(rows), bool),
        segmentations=None if segmentations is None else [segmentations[k] for k in rows.tolist()],
        keypoints=None if keypoints is None else keypoints[rows],
        keypoint_names=names_of_points,
        skipped=faults.skipped,
    )


def _content(file: Path) -> dict:
    """The JSON's dictionary with its lists of dictionaries."""
    if not file.is_file():
        raise UserError(f"{file} is no file; {LAYOUT}")
    collecting = gc.isenabled()
    gc.disable()  # else the collector walks millions of new lists again and again, and finds nothing
    try:
        with open(file, "rb") as stream:
            content = json.load(stream)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); it may be cut short, fetch it again") from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not COCO's dictionary of images and annotations")
    needed = ["images"] if file.name.startswith("image_info_") else ["images", "annotations", "categories"]
    for key in needed:
        rows = content.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            found = ", ".join(list(content)[:8]) or "nothing"
            raise UserError(f"{file} is not COCO's: it has no list {key!r} of dictionaries, only: {found}")
    if not content["images"]:
        raise UserError(f"{file} lists no images; give the file of the split that is meant")
    return content


def _categories(file: Path, rows: list[dict]) -> dict[int, str]:
    ids, names = _column(rows, "id", file, "category"), _column(rows, "name", file, "category")
    if len(set(ids)) < len(ids):
        twice = next(k for k in ids if ids.count(k) > 1)
        raise UserError(f"{file} has two categories of id {twice}; give each its own")
    if any(isinstance(k, bool) or not isinstance(k, int) for k in ids):
        raise UserError(f"{file} has categories whose ids are no integers, e.g. {ids[0]!r}; number them")
    return dict(zip(ids, map(str, names), strict=True))


def _match(file: Path, own: dict[int, str], categories: dict[int, str]) -> None:
    """Raise where a file's categories are not the training set's."""
    for category, name in own.items():
        if categories.get(category) != name:
            raise UserError(
                f"{file}: category {category} is {name}, but in the training set "
                f"{categories.get(category, 'missing')}; the two files must mean the same"
            )


def _column(rows: list[dict], key: str, file: Path, what: str) -> list:
    """``key`` of all rows."""
    try:
        return [row[key] for row in rows]
    except KeyError:
        k = next(k for k, row in enumerate(rows) if key not in row)
        raise UserError(f"{file}: {what} {rows[k].get('id', f'number {k}')} has no {key!r}; add it") from None


def _numbers(rows: list[dict], key: str, file: Path, what: str, width: int = 0) -> np.ndarray:
    """``key`` of all rows, ``(N,)`` or ``(N, width)`` float64."""
    values = _column(rows, key, file, what)
    shape = (len(rows), width) if width else (len(rows),)
    if not rows:
        return np.zeros(shape)
    try:
        numbers = np.array(values, np.float64)
        if numbers.shape == shape and (width or np.isfinite(numbers).all()):
            return numbers
    except (TypeError, ValueError):  # ragged, or no numbers: which one?
        pass
    k = next((k for k, value in enumerate(values) if not _is_numbers(value, width)), 0)
    meant = f"{width} numbers" if width else "a number"
    raise UserError(f"{file}: {what} {rows[k].get('id', f'number {k}')} has {key}={values[k]!r}; make it {meant}")


def _is_numbers(value: object, width: int) -> bool:
    if width:
        return isinstance(value, list) and len(value) == width and all(_is_numbers(number, 0) for number in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sound_images(faults: Faults, file: Path, pictures: Path, image_ids: list, names: list[str]) -> np.ndarray:
    """Which images are listed once and lie in their folder, ``(N,)`` bool."""
    if not pictures.is_dir():
        raise UserError(f"{pictures} is no folder; {LAYOUT}")

    kept = np.ones(len(names), bool)
    for values, what in ((image_ids, "id"), (names, "file_name")):
        kept &= faults.sound(
            kept & repeats(values),
            "image listed twice",
            lambda k, what=what: f"{file} lists image {image_ids[k]} ({names[k]}) twice, by its {what}; remove one",
        )
    if any("/" in name for name in names):
        missing = np.array([not (pictures / name).is_file() for name in names])
    else:
        there = {entry.name for entry in os.scandir(pictures)}  # one look instead of one an image
        missing = np.array([name not in there for name in names])
    return kept & faults.sound(
        missing,
        "missing picture",
        lambda k: f"{file} lists image {image_ids[k]} as {names[k]}, which is not in {pictures}; put it there",
    )


# ---- masks ----


def mask_faults(segmentations: list, sizes: np.ndarray) -> list[str | None]:
    """What is wrong with each of M segmentations in images of height and width ``(M, 2)``; None where nothing is."""
    reasons: list[str | None] = [
        _shape_fault(shape, size) for shape, size in zip(segmentations, sizes.tolist(), strict=True)
    ]
    packed = [
        k
        for k, shape in enumerate(segmentations)
        if reasons[k] is None and isinstance(shape, dict) and isinstance(shape["counts"], str)
    ]
    pixels = packed_pixels([segmentations[k]["counts"] for k in packed])
    for k, covered in zip(packed, pixels.tolist(), strict=True):
        whole = sizes[k, 0] * sizes[k, 1]
        if covered != whole:
            reasons[k] = _coverage(covered, whole)
    return reasons


def _coverage(covered: int, whole: int) -> str:
    if covered < 0:
        return "is cut short: its counts end within a number"
    return f"has run lengths of {covered} pixels in all, where its image has {whole}"


def _shape_fault(shape: object, size: list[int]) -> str | None:
    """What is wrong with a segmentation, but for the numbers in a compressed one."""
    match shape:
        case [_, *_]:
            for polygon in shape:
                if (
                    not isinstance(polygon, list)
                    or len(polygon) < 6
                    or len(polygon) % 2
                    or not set(map(type, polygon)) <= {int, float}
                ):
                    return "has a polygon that is not three or more pairs of x and y"
            return None
        case {"size": [height, width], "counts": list() | str() as counts}:
            if [height, width] != size:
                return f"is of {width} x {height} pixels, its image of {size[1]} x {size[0]}"
            if isinstance(counts, list):
                if not all(isinstance(count, int) and count >= 0 for count in counts):
                    return "has run lengths that are no counts"
                if sum(counts) != height * width:
                    return _coverage(sum(counts), height * width)
            return None
        case None:
            return "is missing"
    return "is neither a list of polygons nor a dictionary of size and counts"


def packed_pixels(counts: list[str]) -> np.ndarray:
    """How many pixels compressed run lengths cover in all, ``(M,)`` int64; -1 where a string is cut short.

    A number is written in groups of five bits, lowest first, one a character from ``0``; 32 says that another group
    follows, and the last group's 16 is the sign. The first three numbers are run lengths, each later one the
    difference to the run length two before it.
    """
    lengths = np.array([len(count) for count in counts], np.int64)
    total = np.zeros(len(counts), np.int64)
    if not lengths.any():
        return np.where(lengths == 0, -1, total)
    codes = np.frombuffer("".join(counts).encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    ends = lengths.cumsum()
    string = np.repeat(np.arange(len(counts)), lengths)
    last = codes & 32 == 0
    broken = ~last[np.maximum(ends - 1, 0)] | (lengths == 0)
    broken[string[(codes < 0) | (codes > 63)]] = True
    last[ends[lengths > 0] - 1] = True  # so that no number goes on into the next string

    number = last.cumsum() - last  # which number a character belongs to
    first = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    shift = 5 * np.minimum(np.arange(len(codes)) - first[number], 11)
    value = np.bincount(number, (codes & 31).astype(float) * 2.0**shift)
    final = np.flatnonzero(last)
    value -= np.where(codes[final] & 16, 2.0 ** (shift[final] + 5), 0)

    of = string[final]
    many = np.bincount(of, minlength=len(counts))
    place = np.arange(len(of)) - (many.cumsum() - many)[of]
    weight = np.where(place == 0, 1, (many[of] - 1 - place) // 2 + 1)  # run lengths that it is a part of
    total = np.bincount(of, value * weight, len(counts)).astype(np.int64)
    return np.where(broken, -1, total)


# ---- keypoints ----


def _keypoint_names(file: Path, categories: list[dict]) -> list[str]:
    """The names that all categories with keypoints share."""
    named = {tuple(row["keypoints"]): row["name"] for row in categories if row.get("keypoints")}
    if len(named) > 1:
        raise UserError(
            f"{file}: {' and '.join(named.values())} name different keypoints; give them one list, or files"
        )
    return list(next(iter(named), ()))


def _keypoints(annotations: list[dict], count: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Keypoints ``(M, K, 3)`` float32, zeros where there are none; which are faulty, ``(M,)`` bool."""
    bad = np.zeros(len(annotations), bool)
    if not count:
        return None, bad
    points = np.zeros((len(annotations), 3 * count), np.float32)
    have = [k for k, annotation in enumerate(annotations) if annotation.get("keypoints")]
    bad[[k for k in have if not _is_numbers(annotations[k]["keypoints"], 3 * count)]] = True
    have = [k for k in have if not bad[k]]
    if have:
        points[have] = np.array([annotations[k]["keypoints"] for k in have], np.float32)
    return points.reshape(-1, count, 3), bad
