"""Small sets with keypoints on disk: rectangles with named corners in COCO's layout, and the facial-keypoints CSV."""

import csv

import numpy as np

from boxed import rectangles, write_coco

CORNERS = ("left_top", "right_top", "middle")


def with_corners(content: dict, missing: int = 5) -> dict:
    """COCO's description of rectangles with two corners and the middle as keypoints; each ``missing``-th lacks one."""
    for k, annotation in enumerate(content["annotations"]):
        x, y, w, h = annotation["bbox"]
        points = [[x, y, 2], [x + w - 1, y, 1], [x + w / 2 - 0.5, y + h / 2 - 0.5, 2]]
        if k % missing == 0:
            points[k % 3] = [0, 0, 0]
        annotation["keypoints"] = [float(value) for point in points for value in point]
    for category in content["categories"]:
        category["keypoints"] = list(CORNERS)
    return content


def write_corners(root, train: int = 12, val: int = 6):
    """A folder in COCO's layout, ``annotations/instances_*``; returns ``root``."""
    contents = [
        with_corners(rectangles(root, split, n, k)) for k, (split, n) in enumerate((("train", train), ("val", val)))
    ]
    return write_coco(root, *contents)


FACE_NAMES = ("left_eye_center", "right_eye_center", "nose_tip", "mouth_left_corner", "mouth_right_corner")


def faces(count: int = 20, seed: int = 0) -> list[dict]:
    """Lines of a CSV: a bright pixel block at every point of a dark face; each third lacks a nose, number 4 all."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        image = rng.integers(0, 40, (96, 96))
        line = {}
        for k, name in enumerate(FACE_NAMES):
            x, y = np.array([[66, 36], [30, 36], [48, 55], [62, 72], [34, 72]][k]) + rng.uniform(-6, 6, 2)
            image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2] = 100 + 30 * k
            missing = i == 4 or (name == "nose_tip" and i % 3 == 0)
            line |= {f"{name}_x": "" if missing else f"{x:.4f}", f"{name}_y": "" if missing else f"{y:.4f}"}
        lines.append({**line, "Image": " ".join(map(str, image.ravel()))})
    return lines


def write_faces(root, lines: list[dict]):
    """``root/training.csv`` of such lines; returns ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "training.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return root
