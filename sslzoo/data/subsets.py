"""Parts of a labelled set: in proportion to its classes, or as a list names them."""

from pathlib import Path

import numpy as np

from sslzoo.data.images import ImageSet
from sslzoo.errors import UserError


def part(images: ImageSet, rows: np.ndarray) -> ImageSet:
    """The images ``rows`` (n,) alone."""
    pixels = None if images.images is None else images.images[rows]
    files = None if images.files is None else [images.files[row] for row in rows.tolist()]
    return ImageSet(images.labels[rows], images.classes, pixels, files, images.name)


def labelled(
    images: ImageSet, fraction: float = 1.0, label_list: str | Path | None = None, seed: int = 0
) -> np.ndarray:
    """Rows of the images whose labels may be used: ``balanced``, or ``listed`` where there is a list.

    Raises:
        UserError: if there are none, or both a fraction and a list were given.
    """
    if not (images.labels >= 0).any():
        raise UserError(f"{images.name} has no labels to learn from; put images in class folders, or choose other data")
    if label_list is None:
        return balanced(images.labels, fraction, seed)
    if fraction != 1:
        raise UserError(
            f"data.label_fraction={fraction} and data.label_list={label_list} both choose images; give one of them"
        )
    return listed(images, label_list)


def listed(images: ImageSet, path: str | Path) -> np.ndarray:
    """Rows that a text file names, ascending: one a line, by file name, CLASS/NAME, or number where there are no files.

    ImageNet's published 1 % and 10 % are such lists, and so is the ``labelled.txt`` of a run.

    Raises:
        UserError: if there is no such file, or it names what is not in the set, or has no label there.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"data.label_list={path} is no file; give a text file of image names, one a line")
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"data.label_list={path} is no text file; give one of image names, one a line") from error
    names = [line.rpartition("\t")[2].strip() for line in lines if line.strip()]
    known = _names(images)
    unknown = [name for name in names if known.get(name, -1) < 0]
    if unknown or not names:
        what = f"names {unknown[0]}, which is not in" if unknown else "names no image of"
        if unknown and unknown[0] in known:
            what = f"names {unknown[0]}, of which there are several in"
        more = f" ({len(unknown)} such lines)" if len(unknown) > 1 else ""
        raise UserError(
            f"data.label_list={path} {what} the {len(images)} images of {images.name}{more}; correct the list"
        )
    rows = np.unique([known[name] for name in names])
    if (images.labels[rows] < 0).any():
        raise UserError(f"data.label_list={path} names images of {images.name} that have no label; take them out")
    return rows


def _names(images: ImageSet) -> dict[str, int]:
    """What a list may call an image, and its row; -1 where a name means several."""
    if images.files is None:
        return {str(row): row for row in range(len(images))}
    names: dict[str, int] = {}
    for row, file in enumerate(images.files):
        names[f"{file.parent.name}/{file.name}"] = row
        names[file.name] = -1 if file.name in names else row
    return names


def as_list(images: ImageSet, rows: np.ndarray) -> str:
    """A list of ``rows`` that ``listed`` reads: the row, and CLASS/NAME where there are files."""
    if images.files is None:
        return "".join(f"{row}\n" for row in rows.tolist())
    files = ((row, images.files[row]) for row in rows.tolist())
    return "".join(f"{row}\t{file.parent.name}/{file.name}\n" for row, file in files)


def balanced(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Rows of a random part that holds ``fraction`` of every class; a smaller part lies inside a larger one.

    Args:
        labels: ``(N,)`` int64; rows of label -1 are left out.
        fraction: 0 to 1, of each class, rounded to whole images.
        seed: of the order in which a class is taken.

    Returns:
        Rows, ascending int64.

    Raises:
        UserError: if ``fraction`` is none, or a class would be left without an image.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.label_fraction={fraction} is no fraction; give more than 0 and at most 1")
    taken = []
    for label in np.unique(labels[labels >= 0]).tolist():
        rows = np.flatnonzero(labels == label)
        count = int(fraction * len(rows) + 0.5)
        if count == 0:
            raise UserError(
                f"data.label_fraction={fraction} leaves class {label} with its {len(rows)} images empty;"
                f" set it to at least {1 / len(rows):.2g}"
            )
        taken.append(np.random.default_rng([seed, label]).permutation(rows)[:count])
    return np.sort(np.concatenate(taken)) if taken else np.arange(0)
