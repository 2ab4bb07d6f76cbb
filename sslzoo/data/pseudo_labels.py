"""What a teacher says of unlabelled images: kept as COCO's annotation file, and judged by labels held back."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslzoo.checkpoints.files import write_text
from sslzoo.data.box_set import BoxSet
from sslzoo.data.coco import read_coco
from sslzoo.errors import UserError


@dataclass
class PseudoLabels:
    """What a teacher is sure of.

    Attributes:
        images: N images, and the M boxes that stand for true ones.
        scores: ``(M,)`` float64, the teacher's.
        threshold: the lowest score that was kept.
    """

    images: BoxSet
    scores: np.ndarray
    threshold: float

    @property
    def density(self) -> float:
        """Boxes an image, images without any included."""
        return len(self.scores) / len(self.images)

    @property
    def empty(self) -> float:
        """Share of the images in which the teacher is sure of nothing."""
        return float((np.diff(self.images.starts) == 0).mean())

    def with_boxes(self) -> BoxSet:
        """The images that have a box.

        The others are no training images: that the teacher is sure of nothing does not mean that there is nothing,
        and as background they would teach the student to overlook what the teacher overlooks.
        """
        return self.images.subset(np.flatnonzero(np.diff(self.images.starts)))

    def write(self, path: str | Path) -> Path:
        """Write COCO's annotation file, with ``score`` and the ids of the set's own annotation file."""
        images = self.images
        files = [file.absolute() for file in images.files]
        folder = Path(os.path.commonpath([file.parent for file in files]))
        of = np.repeat(np.arange(len(images)), np.diff(images.starts)).tolist()
        columns = zip(of, images.xywh.tolist(), images.labels.tolist(), images.areas.tolist(), self.scores.tolist(),
                      strict=True)  # fmt: skip
        annotations = [
            {"id": k, "image_id": images.image_ids[i], "category_id": images.category_ids[label - 1], "bbox": box,
             "area": area, "iscrowd": 0, "score": score}
            for k, (i, box, label, area, score) in enumerate(columns, start=1)
        ]  # fmt: skip
        if images.segmentations is not None:
            for annotation, mask in zip(annotations, images.segmentations, strict=True):
                annotation["segmentation"] = mask
        content = {
            "info": {
                "description": f"pseudo-labels, score {self.threshold:g} or more",
                "threshold": self.threshold,
                "pictures": str(folder),
            },
            "images": [
                {"id": name, "file_name": file.relative_to(folder).as_posix(), "height": height, "width": width}
                for name, file, (height, width) in zip(images.image_ids, files, images.sizes.tolist(), strict=True)
            ],
            "annotations": annotations,
            "categories": [
                {"id": k, "name": name} for k, name in zip(images.category_ids, images.classes, strict=True)
            ],
        }
        return write_text(path, json.dumps(content))

    @classmethod
    def read(cls, path: str | Path, like: BoxSet, masks: bool = False) -> "PseudoLabels":
        """What ``write`` wrote, with the classes of the training set ``like``.

        Raises:
            UserError: if there is no such file, or it holds no pseudo-labels, or others.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"pseudo-labels {path} are no file; task=selftrain writes them to RUN/pseudo/labels.json")
        try:
            content = json.loads(path.read_text())
            info, scores = content["info"], [annotation["score"] for annotation in content["annotations"]]
            pictures, threshold = Path(info["pictures"]), float(info["threshold"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no pseudo-labels ({type(error).__name__}: {error}); label again") from error
        categories = dict(zip(like.category_ids, like.classes, strict=True))
        images = read_coco(path, pictures, like.name, masks, "raise", categories)
        return cls(images, np.array(scores, float), threshold)


def quality(pseudo: PseudoLabels, truth: Sequence[BoxSet], iou: float = 0.5) -> dict[str, float]:
    """How good the boxes of those images are whose labels were held back.

    Boxes are taken by falling score; each takes the true box of its class, and of those that are free, that it
    overlaps most, by ``iou`` at least. Boxes that lie in a crowd by as much are not counted.

    Args:
        pseudo: labels of N images.
        truth: sets with the true boxes of some of them, by ``image_ids``.
        iou: least overlap.

    Returns:
        ``precision`` and ``recall``, 0 to 1, ``true_boxes_per_image`` and ``judged_images``; empty if there are none.
    """
    place = {name: (known, k) for known in truth for k, name in enumerate(known.image_ids)}
    right = wrong = objects = judged = 0
    for i, name in enumerate(pseudo.images.image_ids):
        if name not in place:
            continue
        judged += 1
        known, row = place[name]
        true, found = known.target(row), pseudo.images.target(i)
        crowd, free = true["iscrowd"].numpy(), np.ones(len(true["labels"]), bool)
        objects += int((~crowd).sum())
        overlaps = _overlaps(found["boxes"].double().numpy(), true["boxes"].double().numpy(), crowd)
        overlaps[found["labels"].numpy()[:, None] != true["labels"].numpy()] = 0
        for k in np.argsort(-pseudo.scores[pseudo.images.rows(i)], kind="stable"):
            open_to_it = np.where(free & ~crowd, overlaps[k], 0)
            best = int(open_to_it.argmax()) if len(open_to_it) else 0
            if len(open_to_it) and open_to_it[best] >= iou:
                right, free[best] = right + 1, False
            elif not (overlaps[k][crowd] >= iou).any():
                wrong += 1
    if not judged:
        return {}
    return {
        "precision": right / max(right + wrong, 1),
        "recall": right / max(objects, 1),
        "true_boxes_per_image": objects / judged,
        "judged_images": judged,
    }


def _overlaps(found: np.ndarray, true: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Intersection by union, with crowds by the area of what was found, ``(n, 4), (m, 4) -> (n, m)``."""
    low = np.maximum(found[:, None, :2], true[None, :, :2])
    high = np.minimum(found[:, None, 2:], true[None, :, 2:])
    shared = (high - low).clip(0).prod(2)
    own, other = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (found, true))
    union = np.where(crowd, own[:, None], own[:, None] + other - shared)
    return shared / np.maximum(union, 1e-12)
