"""Held-out pictures that cannot be read: known before a run begins, not at its first look."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from sslzoo.data.box_set import BoxSet
from sslzoo.data.cityscapes import Cityscapes
from sslzoo.data.module import default_workers
from sslzoo.data.points import PointSet
from sslzoo.errors import UserError

Held = TypeVar("Held", BoxSet, Cityscapes, PointSet)


def readable(images: Held, on_error: str, read: Callable[[int], object] | None = None) -> tuple[Held, list[Path]]:
    """A set without what cannot be read, and the files that were left out; every file is read once, in threads.

    Args:
        images: the set; what is left out is counted in the ``skipped`` of the one returned.
        on_error: ``raise`` stops at the first damaged file, ``skip`` leaves out what is in it.
        read: what is tried of an example; its picture if None.

    Raises:
        UserError: under ``raise`` that of the first damaged file, under ``skip`` if no file can be read.
    """
    read = read or images.picture
    asked = [(file, *size) for file, size in zip(images.files, images.sizes.tolist(), strict=True)]
    first: dict[tuple, int] = {}
    of = [first.setdefault(each, k) for k, each in enumerate(asked)]

    def sound(row: int) -> bool:
        try:
            read(row)
        except UserError:
            if on_error == "raise":
                raise
            return False
        return True

    with ThreadPoolExecutor(default_workers()) as pool:
        good = dict(zip(first.values(), pool.map(sound, first.values()), strict=True))
    files = list(dict.fromkeys(file for (file, *_), row in first.items() if not good[row]))
    if not files:
        return images, []
    kept = images.subset(np.flatnonzero([good[row] for row in of]))
    if not len(kept):
        raise UserError(f"no held-out image of data={images.name} can be read, e.g. {files[0]}; fetch them again")
    return replace(kept, skipped=images.skipped + Counter({"unreadable held-out image": len(files)})), files
