"""What a teacher says of the class of images without labels: kept as one archive, and judged by labels held back."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslzoo.checkpoints.files import write_whole
from sslzoo.data.images import ImageSet
from sslzoo.data.subsets import part
from sslzoo.errors import UserError


@dataclass
class PseudoClasses:
    """A teacher's answers, and those of them that a student learns from.

    Attributes:
        rows: ``(n,)`` int64, images of the training set that the teacher looked at.
        probabilities: ``(n, C)`` float32, its softmax.
        taken: ``(m,)`` int64, those of the n that a student learns from; the same one perhaps several times.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    taken: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """The most probable class of each image that was taken, ``(m,)`` int64."""
        return self.probabilities[self.taken].argmax(1)

    def images(self, whole: ImageSet, soft: bool) -> ImageSet:
        """The m images, with the teacher's probabilities as labels, ``(m, C)`` float32, or its classes, ``(m,)``."""
        images = part(whole, self.rows[self.taken])
        images.labels = self.probabilities[self.taken] if soft else self.classes
        return images

    def write(self, path: str | Path, whole: ImageSet) -> Path:
        """Write a ``.npz`` archive, whole, that also tells which training set it speaks of."""
        about = {"set": np.array(whole.fingerprint()), "classes": np.array(whole.classes)}
        arrays = {"rows": self.rows, "probabilities": self.probabilities, "taken": self.taken, **about}
        return write_whole(path, lambda partial: np.savez(partial, **arrays))

    @classmethod
    def read(cls, path: str | Path, whole: ImageSet) -> "PseudoClasses":
        """What ``write`` wrote.

        Raises:
            UserError: if there is no such file, it holds something else, or it speaks of other images than ``whole``.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"pseudo-labels {path} are no file; task=selftrain writes them to RUN/pseudo/labels.npz")
        try:
            with np.load(path, allow_pickle=False) as archive:
                found = cls(archive["rows"], archive["probabilities"], archive["taken"])
                known = str(archive["set"]) == whole.fingerprint() and archive["classes"].tolist() == whole.classes
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} holds no pseudo-labels ({type(error).__name__}: {error}); label again") from error
        if not known:
            raise UserError(f"{path} was made of other images or classes than those of {whole.name}; label again")
        return found


def quality(pseudo: PseudoClasses, labels: np.ndarray) -> dict[str, float | int | None]:
    """How good the pseudo-labels are whose true labels were held back.

    Args:
        labels: of the whole training set, ``(N,)`` int64; -1 where unknown.

    Returns:
        ``right``, the share of the images taken (each counted once) whose class is right, None if none of them can be
        judged; ``right_of_all``, that of all images the teacher looked at; ``judged_images``. Empty if no label is
        known.
    """
    truth = labels[pseudo.rows]
    known = truth >= 0
    if not known.any():
        return {}
    right = pseudo.probabilities.argmax(1) == truth
    taken = np.unique(pseudo.taken)
    taken = taken[known[taken]]
    return {
        "right": float(right[taken].mean()) if len(taken) else None,
        "right_of_all": float(right[known].mean()),
        "judged_images": len(taken),
    }
