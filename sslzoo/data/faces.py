"""The facial-keypoints CSV: gray faces of 96 x 96 pixels with up to 15 points, of which many are missing.

Its points are taken to count from the image's corner: learned as (x - 48) / 48, they are mirrored to 96 - x.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sslzoo.data.box_set import Faults, swapped
from sslzoo.data.boxes import labelled_images
from sslzoo.data.points import PointSet
from sslzoo.errors import UserError

FACE = 96  # pixels of a side


def load_faces(
    root: str | Path | None,
    *,
    held_out: float = 0.2,
    label_fraction: float = 1.0,
    on_error: str = "raise",
    seed: int = 0,
) -> tuple[PointSet, PointSet]:
    """Training and held-out faces of ``root/training.csv``: columns ``NAME_x``, ``NAME_y`` and ``Image``.

    The CSV for testing has no points, so a part of the other is held out, the same for every seed.

    Args:
        root: the folder.
        held_out: that part, 0 to 1.
        label_fraction: part of the other faces that is kept; a smaller part lies in a larger one.
        on_error: ``raise`` at the first faulty line, or ``skip`` and count.
        seed: of the choice of ``label_fraction``.

    Raises:
        UserError: if the file is missing or faulty, or has no point; the line names it and its line.
    """
    if root is None:
        raise UserError("data.root is null, but data=faces needs the folder of training.csv; pass data.root=PATH")
    if not 0 < held_out < 1:
        raise UserError(f"data.held_out={held_out} is no part of the faces; give more than 0 and less than 1")
    faces = read_faces(Path(root).expanduser() / "training.csv", on_error)
    order = np.random.default_rng(0).permutation(len(faces))
    count = round(held_out * len(faces))
    if not 0 < count < len(faces):
        raise UserError(f"data.held_out={held_out} of {len(faces)} faces leaves none to learn from or to score by")
    train, val = faces.subset(np.sort(order[count:])), faces.subset(np.sort(order[:count]))
    return train.subset(labelled_images(len(train), label_fraction, seed)), val


def read_faces(file: Path, on_error: str = "raise") -> PointSet:
    """The faces of one CSV that have a point; an empty cell is a missing point, gray images become RGB.

    Raises:
        UserError: see ``load_faces``.
    """
    if not file.is_file():
        raise UserError(f"{file} is no file; data.root is to be the folder of training.csv")
    faults = Faults(on_error)
    try:
        with open(file, newline="") as stream:
            reader = csv.DictReader(stream)
            names = _point_names(file, reader.fieldnames or [])
            lines, found = [], []
            csv.field_size_limit(2**20)
            for row in reader:
                lines.append(reader.line_num)
                found.append(_face(row, names))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no CSV file ({error}); give the one with points and an Image column") from error
    bad = np.array([isinstance(each, str) for each in found], bool)
    sound = faults.sound(bad, "line", lambda k: f"{file}, line {lines[k]}: {found[k]}; fix it")
    kept = [each for each, good in zip(found, sound.tolist(), strict=True) if good]
    pointed = [each for each in kept if (each[1][:, 2] > 0).any()]
    if not pointed:
        raise UserError(f"{file} has no face with a point: all of {len(found)} are missing; give one with points")
    faults.skipped["without a point"] += len(kept) - len(pointed)
    images = np.stack([image for image, _ in pointed])
    count = len(images)
    return PointSet(
        name="faces",
        names=names,
        swap=swapped(names),
        points=np.stack([points for _, points in pointed]),
        boxes=np.tile(np.array([0, 0, FACE, FACE], np.float32), (count, 1)),
        squares=np.tile(np.array([0, 0, FACE]), (count, 1)),
        sizes=np.full((count, 2), FACE),
        files=[file] * count,
        picture=lambda i: np.repeat(images[i][..., None], 3, axis=2),
        skipped=+faults.skipped,
    )


def _point_names(file: Path, columns: Sequence[str]) -> list[str]:
    names = [column[:-2] for column in columns if column.endswith("_x") and f"{column[:-2]}_y" in columns]
    if not names or "Image" not in columns:
        has = ", ".join(columns[:6]) + (", ..." if len(columns) > 6 else "") or "none"
        raise UserError(f"{file} needs columns NAME_x, NAME_y and Image, but has {has}; give the CSV with points")
    return names


def _face(row: dict[str, str | None], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | str:
    """The image ``(96, 96)`` uint8 and points ``(K, 3)`` float32 of one line, or what is wrong with it."""
    cells = (row["Image"] or "").split()
    if len(cells) != FACE**2:
        return f"its Image has {len(cells)} values, not {FACE**2}"
    try:
        values = np.array(cells, np.float64)
    except ValueError:
        return "its Image has values that are no numbers"
    if not ((values >= 0) & (values <= 255)).all():
        return "its Image has values that are not from 0 to 255"
    points = np.zeros((len(names), 3), np.float32)
    for k, name in enumerate(names):
        pair = (row[f"{name}_x"] or "").strip(), (row[f"{name}_y"] or "").strip()
        if not all(pair):
            continue
        try:
            points[k] = (*(float(value) - 0.5 for value in pair), 1)
        except ValueError:
            return f"{name} is at {pair[0]!r}, {pair[1]!r}, which are no numbers"
        if not np.isfinite(points[k]).all():
            points[k] = 0
    return values.round().astype(np.uint8).reshape(FACE, FACE), points
