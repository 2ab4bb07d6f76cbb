"""Average precision of detections: COCO's numbers through faster-coco-eval, PASCAL VOC's by their own definition.

Predictions are a list with one dictionary an image, in the order of the set, as torchvision's detectors return them:
``boxes`` (n, 4) x1, y1, x2, y2; ``scores`` (n,); ``labels`` (n,) 1 to C; where asked for, ``masks`` (n, H, W) or
(n, 1, H, W), of which more than a half is inside, and ``keypoints`` (n, K, 3).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sslzoo.checkpoints.files import write_text
from sslzoo.data.box_set import BoxSet
from sslzoo.errors import UserError

BOXES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large",
         "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")  # fmt: skip
KEYPOINTS = ("map", "map_50", "map_75", "map_medium", "map_large", "mar", "mar_50", "mar_75", "mar_medium", "mar_large")
SPREAD = 0.05  # of a keypoint as annotators place it, relative to the object's size, where COCO has not measured it
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def coco_scores(
    truth: BoxSet,
    predictions: Sequence[dict],
    iou: str = "bbox",
    sigmas: Sequence[float] | None = None,
    per_class: bool = False,
) -> dict:
    """COCO's numbers, as pycocotools computes them; -1 where there is nothing to find.

    Args:
        truth: the set, with its crowds.
        predictions: of all its images.
        iou: what is compared, ``bbox``, ``segm`` or ``keypoints``.
        sigmas: of K keypoints; null takes COCO's for its 17 of a person, else 0.05.
        per_class: add ``classes``, AP by class name.

    Returns:
        ``map``, ``map_50``, ..., ``mar_large`` (see ``BOXES`` and ``KEYPOINTS``), 0 to 1.
    """
    from faster_coco_eval import COCO, COCOeval_faster  # a second to import, which training need not wait for

    if iou == "keypoints" and truth.keypoints is None:
        raise UserError(f"data={truth.name} has no keypoints to score; compare bbox or segm")
    labels = list(range(1, len(truth.classes) + 1))
    numbers = _numbers(truth)
    images = [{"id": k, "height": h, "width": w} for k, (h, w) in zip(numbers, truth.sizes.tolist(), strict=True)]
    shared = {"images": images, "categories": [{"id": k, "name": str(k)} for k in labels]}
    found = _records(truth, predictions, iou, numbers, labels)
    for k, record in enumerate(found, start=1):
        record |= {"id": k, "iscrowd": 0, "area": _area(record)}
    coco_truth = COCO({**shared, "annotations": _annotations(truth, iou, numbers)})
    if iou == "keypoints" and sigmas is None and truth.keypoints.shape[1] != 17:
        sigmas = [SPREAD] * truth.keypoints.shape[1]
    evaluator = COCOeval_faster(
        coco_truth,
        COCO({**shared, "annotations": found}),
        iou,
        print_function=lambda *_: None,
        kpt_oks_sigmas=None if sigmas is None else np.asarray(sigmas, float),
    )
    evaluator.params.catIds = labels
    evaluator.run()
    scores = dict(zip(KEYPOINTS if iou == "keypoints" else BOXES, map(float, evaluator.stats), strict=True))
    if per_class:
        precision = evaluator.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
        scores["classes"] = {
            name: float(values[values > -1].mean()) if (values > -1).any() else -1.0
            for name, values in zip(truth.classes, precision.transpose(2, 0, 1), strict=True)
        }
    return scores


def write_results(path: str | Path, truth: BoxSet, predictions: Sequence[dict], iou: str = "bbox") -> Path:
    """Write predictions as COCO's results file, with the image and category ids of the annotation file.

    With masks or keypoints there are no boxes: pycocotools would take a box for the size of its object.
    """
    records = _records(truth, predictions, iou, truth.image_ids, truth.category_ids)
    if iou != "bbox":
        records = [{key: value for key, value in record.items() if key != "bbox"} for record in records]
    return write_text(path, json.dumps(records))


def _records(
    truth: BoxSet, predictions: Sequence[dict], iou: str, image_ids: Sequence[int | str], category_ids: Sequence[int]
) -> list[dict]:
    """One of COCO's result dictionaries a detection."""
    if iou not in ("bbox", "segm", "keypoints"):
        raise UserError(f"iou={iou} is none of bbox, segm, keypoints")
    if len(predictions) != len(truth):
        raise ValueError(f"{len(predictions)} predictions for {len(truth)} images")
    records = []
    for image, found in zip(image_ids, predictions, strict=True):
        boxes = _array(found["boxes"]).reshape(-1, 4)
        boxes[:, 2:] -= boxes[:, :2]
        columns = [
            [category_ids[label - 1] for label in _array(found["labels"]).astype(int).tolist()],
            _array(found["scores"]).tolist(),
            boxes.tolist(),
        ]
        more = {"bbox": [], "segm": ["segmentation"], "keypoints": ["keypoints"]}[iou]
        if iou == "segm":
            columns.append(packed(found["masks"]))
        elif iou == "keypoints":
            columns.append([points.ravel().tolist() for points in _array(found["keypoints"])])
        keys = ["category_id", "score", "bbox", *more]
        records += [{"image_id": image, **dict(zip(keys, row, strict=True))} for row in zip(*columns, strict=True)]
    return records


def _array(values) -> np.ndarray:
    """A copy in float64."""
    return torch.as_tensor(values).detach().cpu().double().clone().numpy()


def packed(masks) -> list[dict]:
    """Masks as run lengths whose counts are text; those that are packed stay as they are."""
    if isinstance(masks, list):
        return masks
    from faster_coco_eval.core import mask as coder

    masks = torch.as_tensor(masks).detach().cpu()
    masks = masks.reshape(-1, *masks.shape[-2:])
    inside = (masks > 0.5).to(torch.uint8).numpy()
    if not len(inside):
        return []
    coded = coder.encode(np.asfortranarray(inside.transpose(1, 2, 0)))
    return [{"size": list(map(int, one["size"])), "counts": _text(one["counts"])} for one in coded]


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _area(record: dict) -> float:
    """Of a detection, by what is compared, as pycocotools measures it."""
    if "segmentation" in record:
        from faster_coco_eval.core import mask as coder

        return float(coder.area(record["segmentation"]))
    if "keypoints" in record:
        x, y = record["keypoints"][0::3], record["keypoints"][1::3]
        return (max(x) - min(x)) * (max(y) - min(y))
    return record["bbox"][2] * record["bbox"][3]


def _numbers(truth: BoxSet) -> list[int]:
    """Numbers from 1 in the order of the image ids: pycocotools takes equal scores in that order."""
    numbers = [0] * len(truth)
    for number, i in enumerate(sorted(range(len(truth)), key=truth.image_ids.__getitem__), start=1):
        numbers[i] = number
    return numbers


def _annotations(truth: BoxSet, iou: str, numbers: list[int]) -> list[dict]:
    """The truth's dictionaries, with image numbers and labels."""
    image = np.repeat(numbers, np.diff(truth.starts))
    columns = {
        "image_id": image.tolist(),
        "category_id": truth.labels.tolist(),
        "bbox": truth.xywh.tolist(),
        "area": truth.areas.tolist(),
        "iscrowd": truth.crowd.astype(int).tolist(),
        "id": list(range(1, len(image) + 1)),  # from 1: 0 would mean "not matched"
    }
    if iou == "segm":
        columns["segmentation"] = [one for i in range(len(truth)) for one in truth.run_lengths(i)]
    if iou == "keypoints":
        columns["keypoints"] = [points.ravel().tolist() for points in truth.keypoints.astype(float)]
        columns["num_keypoints"] = (truth.keypoints[:, :, 2] > 0).sum(1).tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# ---- PASCAL VOC ----


def voc_scores(truth: BoxSet, predictions: Sequence[dict], metric: str = "area") -> dict:
    """PASCAL VOC's average precision, its mean over the classes that occur.

    A detection, from the surest on, belongs to the object of its class that it overlaps most. It is right if their IoU
    is over the threshold and no surer one took the object, and not counted if that object is difficult (or a crowd).
    Pixels are counted as PASCAL does: its IoU with inclusive ends is that of our boxes.

    Args:
        truth: the set, with its difficult objects.
        predictions: of all its images.
        metric: ``area`` under the curve, as from 2010 on, or ``11point``, as for VOC2007.

    Returns:
        ``map_50``; ``map_75``; ``map``, the mean over thresholds .5 to .95; ``classes``, AP at .5 by class name, -1
        where a class does not occur.
    """
    if metric not in ("area", "11point"):
        raise UserError(f"metric={metric} is neither area nor 11point")
    if len(predictions) != len(truth):
        raise ValueError(f"{len(predictions)} predictions for {len(truth)} images")
    corners = np.concatenate([truth.xywh[:, :2], truth.xywh[:, :2] + truth.xywh[:, 2:]], axis=1)
    image = np.repeat(np.arange(len(truth)), np.diff(truth.starts))
    left_out = truth.difficult | truth.crowd
    boxes, scores, labels = (
        np.concatenate([np.zeros(shape), *(_array(found[key]).reshape(-1, *shape[1:]) for found in predictions)])
        for key, shape in (("boxes", (0, 4)), ("scores", (0,)), ("labels", (0,)))
    )
    seen_in = np.repeat(np.arange(len(predictions)), [len(found["scores"]) for found in predictions])
    curves = np.full((len(truth.classes), len(THRESHOLDS)), np.nan)
    for label in range(1, len(truth.classes) + 1):
        own, mine = truth.labels == label, np.flatnonzero(labels == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")]
        objects = int((own & ~left_out).sum())
        if objects:
            overlap, best = _overlaps(boxes[mine], seen_in[mine], corners[own], image[own])
            curves[label - 1] = [
                _average_precision(*_verdicts(overlap > threshold, best, left_out[own]), objects, metric)
                for threshold in THRESHOLDS
            ]
    occurs = ~np.isnan(curves[:, 0])
    mean = curves[occurs].mean(0) if occurs.any() else np.full(len(THRESHOLDS), -1.0)
    by_class = np.where(occurs, curves[:, 0], -1).tolist()
    return {
        "map": float(mean.mean()),
        "map_50": float(mean[0]),
        "map_75": float(mean[5]),
        "classes": dict(zip(truth.classes, by_class, strict=True)),
    }


def _overlaps(
    boxes: np.ndarray, seen_in: np.ndarray, objects: np.ndarray, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU of each of D boxes with the objects of its image, and which object that is, ``(D,)`` each.

    ``image`` ascends. Where an image has no objects the IoU is 0 and the object -1.
    """
    first, end = np.searchsorted(image, seen_in), np.searchsorted(image, seen_in, side="right")
    counts = end - first
    box = np.repeat(np.arange(len(boxes)), counts)  # all pairs of one image, one after the other
    start = counts.cumsum() - counts
    other = np.arange(len(box)) - np.repeat(start - first, counts)
    a, b = boxes[box], objects[other]
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = sides.clip(0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
    iou = shared / np.maximum(union, np.finfo(float).tiny)

    largest, best = np.zeros(len(boxes)), np.full(len(boxes), -1)
    some = np.flatnonzero(counts)
    if len(some):
        largest[some] = np.maximum.reduceat(iou, start[some])
        reached = np.flatnonzero(iou == largest[box])
        which, place = np.unique(box[reached], return_index=True)  # the first object that reaches it
        best[which] = other[reached[place]]
    return largest, best


def _verdicts(hit: np.ndarray, best: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of D detections, by falling score, are right, and which are wrong, ``(D,)`` bool each."""
    ignored = hit.copy()
    ignored[hit] = left_out[best[hit]]
    counted = np.flatnonzero(hit & ~ignored)
    right = np.zeros(len(hit), bool)
    right[counted[np.unique(best[counted], return_index=True)[1]]] = True
    return right, ~right & ~ignored


def _average_precision(right: np.ndarray, wrong: np.ndarray, objects: int, metric: str) -> float:
    """From the verdicts by falling score."""
    hits = right.cumsum()
    recall = hits / objects
    precision = hits / np.maximum(hits + wrong.cumsum(), 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a larger one
    if metric == "area":
        return float((np.diff(recall, prepend=0) * envelope).sum())
    at = np.searchsorted(recall, np.arange(11) * 0.1)
    return float(np.append(envelope, 0)[at].sum() / 11)
