"""Small sets with boxes on disk, in COCO's and in PASCAL VOC's layout."""

import json

import numpy as np
import torch
from PIL import Image

from sslzoo.data.box_module import Boxes, BoxLoader, box_example
from sslzoo.data.box_set import BoxSet

IDS = (3, 90)  # of the categories of ``rectangles``
COLOURS = ((230, 40, 40), (40, 60, 230))


def picture(height=30, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rectangle(height, width, left, top, right, bottom):
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def runs(mask):
    """COCO's uncompressed run lengths, column by column, zeros first: an independent count."""
    flat = mask.ravel(order="F")
    lengths, value, run = [], 0, 0
    for pixel in flat:
        if pixel != value:
            lengths.append(run)
            value, run = pixel, 0
        run += 1
    return {"size": list(mask.shape), "counts": [*lengths, run]}


def content():
    """Three images, of which 7 is empty; three categories with gaps, out of order; all forms of masks; a crowd."""
    from pycocotools import mask

    packed = mask.encode(np.asfortranarray(rectangle(20, 25, 5, 6, 12, 16)))["counts"].decode()
    return {
        "images": [
            {"id": 139, "file_name": "b.png", "height": 30, "width": 40},
            {"id": 7, "file_name": "a.png", "height": 24, "width": 24},
            {"id": 285, "file_name": "c.png", "height": 20, "width": 25},
        ],
        "annotations": [
            {"id": 1, "image_id": 285, "category_id": 90, "bbox": [5, 6, 7, 10], "area": 70, "iscrowd": 0,
             "segmentation": {"size": [20, 25], "counts": packed}},
            {"id": 2, "image_id": 139, "category_id": 3, "bbox": [2, 3, 10, 5], "area": 50, "iscrowd": 0,
             "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]]},
            {"id": 3, "image_id": 139, "category_id": 1, "bbox": [20.5, 1, 10, 12], "area": 60, "iscrowd": 1,
             "segmentation": runs(rectangle(30, 40, 21, 1, 30, 13))},
            {"id": 4, "image_id": 139, "category_id": 90, "bbox": [4, 4, 4, 4], "area": 16, "iscrowd": 0,
             "segmentation": [[4, 4, 8, 4, 8, 6, 4, 6], [4, 6, 8, 6, 8, 8, 4, 8]]},
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}, {"id": 90, "name": "brush"}],
    }  # fmt: skip


def write_coco(root, train=None, val=None):
    """Pictures and annotation files of ``content()``-like dictionaries; returns ``root``."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, entry in (("train", train or content()), ("val", val or content())):
        folder = root / f"{split}2017"
        folder.mkdir(exist_ok=True)
        for image in entry["images"]:
            if isinstance(image, dict) and not (folder / image["file_name"]).exists():
                Image.fromarray(picture(image["height"], image["width"])).save(folder / image["file_name"])
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(entry))
    return root


OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox>
<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def write_voc(root, year, lists, objects, size=(30, 40), segmentation=()):
    """A part of VOCdevkit: lists of image names, and ``objects[name]`` of name, difficult, xmin, ymin, xmax, ymax."""
    top = root / "VOCdevkit" / f"VOC{year}"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass",
                   "SegmentationObject"):  # fmt: skip
        (top / folder).mkdir(parents=True, exist_ok=True)
    height, width = size
    for part, names in lists.items():
        (top / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")
        drawn = [name for name in names if name in segmentation]
        (top / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(drawn) + "\n")
        for name in names:
            Image.fromarray(picture(height, width)).save(top / "JPEGImages" / f"{name}.jpg")
            entries = "".join(OBJECT.format(*entry) for entry in objects.get(name, []))
            (top / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
                f"{entries}</annotation>"
            )
            if name in segmentation:
                classes, things = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
                for k, (label, _, x1, y1, x2, y2) in enumerate(objects[name], start=1):
                    classes[y1 - 1 : y2, x1 - 1 : x2] = segmentation[name][label]
                    things[y1 - 1 : y2, x1 - 1 : x2] = k
                classes[0, 0] = 255
                for folder, values in (("SegmentationClass", classes), ("SegmentationObject", things)):
                    indexed = Image.fromarray(values, "L").convert("P")
                    indexed.putdata(values.ravel().tolist())
                    indexed.save(top / folder / f"{name}.png")
    return root


def random_truth(rng, images=12, classes=3, most=6, side=120, crowds=0.15, difficult=0.0, masks=False, points=0):
    """A set without pictures, with empty images, crowds, small and large objects, and no object of the last class."""
    counts = rng.integers(0, most, images) * (rng.random(images) < 0.8)
    total = int(counts.sum())
    corner = rng.uniform(0, 0.6 * side, (total, 2)).round(2)
    sides = np.exp(rng.uniform(np.log(4), np.log(side), (total, 2)))
    sides = np.minimum(sides, side - corner).round(2)
    crowd = rng.random(total) < crowds
    shapes = keypoints = None
    if masks:
        boxes = np.concatenate([corner, corner + sides], 1).round().astype(int).clip(0, side)
        shapes = [runs(rectangle(side, side, *box)) for box in boxes.tolist()]
    if points:
        keypoints = np.concatenate(
            [corner[:, None] + rng.random((total, points, 2)) * sides[:, None],
             rng.integers(0, 3, (total, points, 1))], axis=2
        ).astype(np.float32)  # fmt: skip
    return BoxSet(
        name="random",
        classes=[f"class {k}" for k in range(classes)],
        category_ids=[3 + 7 * k for k in range(classes)],
        image_ids=rng.permutation(10 * images)[:images].tolist(),
        files=[None] * images,
        sizes=np.full((images, 2), side),
        starts=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        xywh=np.concatenate([corner, sides], axis=1),
        labels=rng.integers(1, max(classes, 2), total),
        areas=sides.prod(1) * rng.uniform(0.5, 1, total),
        crowd=crowd,
        difficult=rng.random(total) < difficult,
        segmentations=shapes,
        keypoints=keypoints,
        keypoint_names=[f"point {k}" for k in range(points)],
    )


def random_predictions(rng, truth, per_image=9):
    """Noisy copies of the objects, and boxes anywhere; scores have ties; every third image gets none."""
    found = []
    for i in range(len(truth)):
        target = truth.target(i)
        n = 0 if i % 3 == 2 else per_image
        side = int(truth.sizes[i].min())
        corner = rng.uniform(0, 0.7 * side, (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(3, 0.3 * side, (n, 2))], axis=1)
        labels = rng.integers(1, len(truth.classes) + 1, n)
        copies = np.flatnonzero(rng.random(n) < 0.75) if len(target["boxes"]) else np.arange(0)
        which = rng.integers(0, max(len(target["boxes"]), 1), len(copies))
        if len(copies):
            boxes[copies] = target["boxes"].numpy()[which] + rng.normal(0, 2, (len(copies), 4))
            labels[copies] = target["labels"].numpy()[which]
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        entry = {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": torch.from_numpy(labels),
            "scores": torch.from_numpy(rng.random(n).round(1).astype(np.float32)),
        }
        if truth.segmentations is not None:
            corners = boxes.round().astype(int).clip(0, side)
            drawn = [rectangle(side, side, *box) for box in corners.tolist()]
            entry["masks"] = torch.from_numpy(np.stack(drawn) if n else np.zeros((0, side, side), np.uint8))
        if truth.keypoints is not None:
            k = truth.keypoints.shape[1]
            points = rng.uniform(0, side, (n, k, 3))
            if len(copies):
                points[copies] = truth.keypoints[truth.rows(i)][which] + rng.normal(0, 2, (len(copies), k, 3))
            entry["keypoints"] = torch.from_numpy(points.astype(np.float32))
        found.append(entry)
    return found


def rectangles(root, split: str, count: int, seed: int) -> dict:
    """Pictures of 48 to 64 pixels with a red and a blue rectangle or none, and COCO's description of them."""
    rng = np.random.default_rng(seed)
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        height, width = rng.integers(48, 65, 2).tolist()
        pixels = rng.integers(90, 150, (height, width, 3), dtype=np.uint8)
        image = 1000 + 7 * i
        for k, category in enumerate(IDS if i % 4 != 3 else ()):
            left, top, w, h = (*rng.integers(2, 16, 2), *rng.integers(18, 30, 2))
            left, top = (left, top) if k == 0 else (min(left + 20, width - w), min(top + 20, height - h))
            pixels[top : top + h, left : left + w] = COLOURS[k]
            box = [int(left), int(top), int(w), int(h)]
            polygon = [left, top, left + w, top, left + w, top + h, left, top + h]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0,
                 "area": int(w * h), "segmentation": [[int(value) for value in polygon]]}
            )  # fmt: skip
        Image.fromarray(pixels).save(folder / f"{image}.png")
        images.append({"id": image, "file_name": f"{image}.png", "height": height, "width": width})
    categories = [{"id": category, "name": name} for category, name in zip(IDS, ("red", "blue"), strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def data(sets, augment="s1", size=48, batch_size=4, seed=5, wanted=("boxes", "labels"), **options) -> Boxes:
    """Batches of a training and a held-out set, as ``task=detect`` has them."""
    return Boxes(*sets, box_example(sets[0], augment, size, seed, wanted), batch_size, seed=seed, **options)


def loader(sets, augment="s1", size=48, batch_size=4, seed=5, wanted=("boxes", "labels"), **options) -> BoxLoader:
    """The loader of such batches, without a trainer."""
    return BoxLoader(sets[0], box_example(sets[0], augment, size, seed, wanted), batch_size, seed, **options)


def flat(batch) -> list[torch.Tensor]:
    """All tensors of a batch."""
    return [*batch.images, batch.index, *(target[name] for target in batch.targets for name in sorted(target))]


def same(a, b) -> bool:
    """Whether two lists of batches are equal to the bit."""
    one, other = ([t for batch in batches for t in flat(batch)] for batches in (a, b))
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
