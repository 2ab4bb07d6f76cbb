"""The built-in set with boxes: objects cut out of photographs, and drawn ones, on photographs; no download.

Four kinds of objects are pieces of a photograph with a wavy outline, their class is the photograph; four are drawn,
their class is the shape, and they have four keypoints. Training and validation share no pixel of a photograph (see
``sslzoo.data.photos``), neither in objects nor in backgrounds. A scene has up to four objects, one in twenty has none.

The set is written once, in COCO's own format, and then read as any other.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from sslzoo.data import photos
from sslzoo.errors import UserError

VERSION = 1  # of the pictures: another number for other pixels or boxes
TRAIN, VAL, UNLABELLED = 1000, 200, 2000
SPLITS = {"train": 0, "val": 1, "unlabeled": 2}  # begin the random numbers of their scenes

CUT_OUT = ("cat", "tissue", "retina", "flower")  # photographs that objects are cut out of
BEHIND = ("astronaut", "coffee", "galaxies", "motorcycle", "rocket", "pagoda")  # photographs that are backgrounds
KEYPOINTS = ("top", "left", "bottom", "right")  # of a drawn object, as it stands upright

_SPIKES = np.array([1, 0.42] * 5)
_TURN = np.arange(10) * np.pi / 5
DRAWN = {  # outline and keypoints of an object in the square from -1 to 1, y downwards
    "kite": ([[0, -1], [0.62, -0.3], [0, 1], [-0.62, -0.3]], [[0, -1], [-0.62, -0.3], [0, 1], [0.62, -0.3]]),
    "cross": (
        [[-0.33, -1], [0.33, -1], [0.33, -0.33], [1, -0.33], [1, 0.33], [0.33, 0.33],
         [0.33, 1], [-0.33, 1], [-0.33, 0.33], [-1, 0.33], [-1, -0.33], [-0.33, -0.33]],
        [[0, -1], [-1, 0], [0, 1], [1, 0]],
    ),
    "arrow": (
        [[0, -1], [0.8, 0], [0.3, 0], [0.3, 1], [-0.3, 1], [-0.3, 0], [-0.8, 0]],
        [[0, -1], [-0.8, 0], [0, 1], [0.8, 0]],
    ),
    "star": (
        np.stack([_SPIKES * np.sin(_TURN), -_SPIKES * np.cos(_TURN)], axis=1).tolist(),
        [[0, -1], [-0.951, -0.309], [0, 0.42], [0.951, -0.309]],
    ),
}  # fmt: skip
CATEGORIES = {3: "cat", 7: "tissue", 16: "retina", 21: "flower", 44: "kite", 62: "cross", 78: "arrow", 90: "star"}

SIDES = (96, 112, 128)  # of a scene, height and width drawn apart
OBJECT = (16, 60)  # longest side of an object, uniform in the logarithm
EMPTY = 0.05
CROWDED = 0.3  # largest part of a box that another may cover
LEAST = 40  # pixels of an object that can be seen
PIECES, GROUNDS = 1200, 1200  # patches of photographs that objects and backgrounds are made of
FINER = 4  # outlines are drawn so many times larger, then reduced


def folder(root: str | Path | None = None) -> Path:
    """Where the scenes lie, written at the first call: ``root``, or a folder of their own in the user's cache.

    Raises:
        UserError: if ``root`` holds something else, or cannot be written.
    """
    place = _cache() / f"scenes-{VERSION}" if root is None else Path(root).expanduser()
    if (place / "annotations" / "instances_val2017.json").is_file():
        return place
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"data.root={place} holds no scenes, and is not empty; name a folder to write them to, or null")
    try:
        write_scenes(place)
    except OSError as error:
        raise UserError(f"scenes cannot be written to {place} ({error.strerror}); pass data.root=PATH") from error
    return place


def unlabelled_folder() -> Path:
    """More scenes like the training ones, in the user's cache, written at the first call: to be labelled by a teacher.

    Their true boxes are in ``annotations/instances_unlabeled2017.json``, to judge its labels by, and for nothing else.
    """
    place = _cache() / f"scenes-{VERSION}-unlabelled"
    if not (place / "annotations" / "instances_unlabeled2017.json").is_file():
        _write(place, {"unlabeled": UNLABELLED})
    return place


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sslzoo"


def write_scenes(place: Path, train: int = TRAIN, val: int = VAL) -> None:
    """Write both splits to ``place``, whole or not at all; who comes second keeps what the first has written."""
    _write(place, {"train": train, "val": val})


def _write(place: Path, counts: dict[str, int]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent))
    try:
        os.chmod(partial, 0o755)  # mkdtemp's is the user's alone
        (partial / "annotations").mkdir()
        for split, count in counts.items():
            _write_split(partial, split, count)
        try:
            os.rename(partial, place)
        except OSError:
            if not (place / "annotations" / f"instances_{split}2017.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_split(top: Path, split: str, count: int) -> None:
    pictures = top / f"{split}2017"
    pictures.mkdir()
    pieces, grounds = _material(split == "val")
    images, annotations = [], []
    for k in range(count):
        rng = np.random.default_rng([VERSION, SPLITS[split], k])
        pixels, found = _scene(rng, pieces, grounds)
        number = 1000 + 7 * k + (10**6 if split == "unlabeled" else 0)  # beside the training set's
        image = {"id": number, "file_name": f"{number:012d}.jpg"}
        images.append(image | {"height": pixels.shape[0], "width": pixels.shape[1]})
        (pictures / image["file_name"]).write_bytes(
            simplejpeg.encode_jpeg(pixels, quality=92, colorsubsampling="444", fastdct=False)
        )
        for entry in found:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 0, **entry})
    drawn = {"keypoints": list(KEYPOINTS), "skeleton": [[1, 3], [2, 4]]}
    categories = [{"id": k, "name": name, **(drawn if name in DRAWN else {})} for k, name in CATEGORIES.items()]
    content = {
        "info": {"description": f"sslzoo scenes {VERSION}, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (top / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _material(validation: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pieces for objects by their photograph, and backgrounds, each ``(n, 48, 48, 3)`` of one side of the split."""
    sources = dict(zip(photos.PHOTOS, photos.read_photos(), strict=True))
    many = np.array([PIECES, GROUNDS]) // (4 if validation else 1)
    cut = photos.cut([sources[name] for name in CUT_OUT], int(many[0]), validation, size=48)
    pieces = {name: cut.images[cut.labels == label] for label, name in enumerate(CUT_OUT)}
    return pieces, photos.cut([sources[name] for name in BEHIND], int(many[1]), validation, size=48).images


def _scene(
    rng: np.random.Generator, pieces: dict[str, np.ndarray], grounds: np.ndarray
) -> tuple[np.ndarray, list[dict]]:
    """One picture ``(H, W, 3)`` uint8 and its annotations."""
    height, width = rng.choice(SIDES, 2).tolist()
    ground = Image.fromarray(grounds[rng.integers(len(grounds))])
    canvas = np.asarray(ground.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    count = 0 if rng.random() < EMPTY else int(rng.integers(1, 5))
    placed: list[tuple[int, np.ndarray, np.ndarray]] = []  # category, mask of what is seen, keypoints
    for _ in range(count):
        spot = _spot(rng, height, width, [mask for _, mask, _ in placed])
        if spot is None:
            continue
        category = int(rng.choice(list(CATEGORIES)))
        outline, points = _outline(rng, CATEGORIES[category])
        angle = rng.uniform(-0.45, 0.45)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        center, radius = spot
        outline, points = (center + radius * (corners @ turn) for corners in (outline, points))
        cover = _cover(outline, height, width)
        texture = _texture(rng, CATEGORIES[category], pieces, center, radius, height, width)
        canvas += cover[..., None] * (texture - canvas)
        mask = cover >= 0.5
        placed = [(other, seen & ~mask, at) for other, seen, at in placed]
        placed.append((category, mask, points))
    canvas += rng.normal(0, 2, canvas.shape)
    pixels = np.ascontiguousarray(canvas.round().clip(0, 255).astype(np.uint8))
    return pixels, [_annotation(*entry) for entry in placed if entry[1].sum() >= LEAST]


def _spot(
    rng: np.random.Generator, height: int, width: int, masks: list[np.ndarray]
) -> tuple[np.ndarray, float] | None:
    """A center and half a side for an object that covers little of the others; None where no place was found."""
    for _ in range(20):
        radius = float(np.exp(rng.uniform(*np.log(OBJECT)))) / 2
        center = rng.uniform([0.7 * radius] * 2, [width - 0.7 * radius, height - 0.7 * radius])
        left, top = np.maximum(center - radius, 0).astype(int)
        right, bottom = np.ceil(center + radius).astype(int)
        covered = [(mask[top:bottom, left:right].sum(), mask.sum()) for mask in masks]
        if all(hidden <= CROWDED * min(seen, 3 * radius**2) for hidden, seen in covered):
            return center, radius
    return None


def _outline(rng: np.random.Generator, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Corners of an object between -1 and 1, ``(n, 2)``, and its keypoints ``(4, 2)``, or none, ``(0, 2)``."""
    if name in DRAWN:
        outline, points = DRAWN[name]
        narrow = np.array([rng.uniform(0.75, 1), 1])
        return np.array(outline) * narrow, np.array(points) * narrow
    angles = np.arange(40) * (2 * np.pi / 40)
    waves = np.arange(2, 5)[:, None]
    wavy = rng.uniform(-0.12, 0.12, 3) @ np.cos(waves * angles + rng.uniform(0, 2 * np.pi, (3, 1)))
    radii = (1 + wavy) / (1 + wavy).max()
    squeeze = np.array([rng.uniform(0.65, 1), 1])
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1) * squeeze, np.zeros((0, 2))


def _cover(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each pixel an outline covers, ``(height, width)`` float32, 0 to 1."""
    fine = Image.new("L", (width * FINER, height * FINER))
    ImageDraw.Draw(fine).polygon([tuple(corner) for corner in (outline * FINER - 0.5).tolist()], fill=255)
    return np.asarray(fine.reduce(FINER), np.float32) / 255


def _texture(
    rng: np.random.Generator,
    name: str,
    pieces: dict[str, np.ndarray],
    center: np.ndarray,
    radius: float,
    height: int,
    width: int,
) -> np.ndarray:
    """What fills an object, ``(height, width, 3)`` float32: its photograph, or two colours that run into each other."""
    if name in pieces:
        piece = pieces[name][rng.integers(len(pieces[name]))]
        side = int(np.ceil(2 * radius)) + 2
        left, top = np.floor(center - side / 2).astype(int).tolist()
        picture = Image.new("RGB", (width, height))
        picture.paste(Image.fromarray(piece).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        return np.asarray(picture, np.float32)
    start, end = rng.uniform(0, 255, (2, 3))
    direction = rng.normal(size=2)
    y, x = np.mgrid[:height, :width] - center[::-1, None, None]
    along = (x * direction[0] + y * direction[1]) / (2 * radius * np.linalg.norm(direction)) + 0.5
    return (start + along.clip(0, 1)[..., None] * (end - start)).astype(np.float32)


def _annotation(category: int, mask: np.ndarray, points: np.ndarray) -> dict:
    """COCO's record of the part of an object that can be seen."""
    from faster_coco_eval.core import mask as coder

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    packed = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = packed["counts"]
    found = {
        "category_id": category,
        "bbox": [int(v) for v in (columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])],
        "area": int(mask.sum()),
        "segmentation": {
            "size": [int(side) for side in mask.shape],
            "counts": counts.decode() if isinstance(counts, bytes) else counts,
        },
    }
    if len(points):
        height, width = mask.shape
        inside = ((points >= 0) & (points < [width, height])).all(1)  # points count from the corner of the image
        pixel = np.floor(points.clip(0, [width - 1, height - 1])).astype(int)
        near = np.array([mask[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].any() for x, y in pixel.tolist()])
        seen = np.where(inside, 1 + near, 0)
        rounded = np.where(inside[:, None], (points - 0.5).round(2), 0)  # COCO's from the middle of its first pixel
        found["keypoints"] = np.column_stack([rounded, seen]).ravel().tolist()
        found["num_keypoints"] = int(inside.sum())
    return found
