"""Sets of images: the built-in photographs, torchvision's sets, folders, and MedMNIST archives.

``load`` returns a training and a validation set. Both answer three questions: how many images, which one is
row i, and is this the set of yesterday's run.
"""

import hashlib
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslzoo.data import photos
from sslzoo.data.decode import CorruptImage, decode
from sslzoo.errors import UserError

TORCHVISION = ("cifar10", "cifar100", "stl10", "svhn", "fashion_mnist")
NAMES = ("photos", *TORCHVISION, "folder", "imagenet", "npz")
WITH_BOXES = ("coco", "voc", "scenes")  # their training images are taken without labels
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LAYOUT = "expected train/CLASS/*.jpg and val/CLASS/*.jpg"


@dataclass
class ImageSet:
    """N images and their labels, in memory or on disk; row i is training image i whatever the sampler.

    Attributes
    ----------
    labels : np.ndarray of shape (N,), int64
        -1 where unknown. Of soft pseudo-labels: probabilities of all C classes, (N, C) float32.
    classes : list of str
        Names of the labels 0, 1, ...; empty where unknown.
    images : np.ndarray of shape (N, H, W, 3), uint8, or None
        Where the set lives in memory.
    files : list of Path, or None
        One file a row, where the set was read from files.
    name : str
        The name it was loaded by.
    """

    labels: np.ndarray
    classes: list[str]
    images: np.ndarray | None
    files: list[Path] | None
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> np.ndarray:
        """Image i, (H, W, 3) uint8, from any thread; raises ``CorruptImage`` for a damaged file."""
        if self.images is not None:
            return self.images[i]
        assert self.files is not None  # one of the two holds the set
        return decode(self.files[i])

    def fingerprint(self) -> str:
        """16 hex digits of the labels and the pixels in memory, or the files' names, sizes and times."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr(self.classes).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        if self.images is not None:
            digest.update(repr(self.images.shape).encode())
            digest.update(np.ascontiguousarray(self.images).data)
        else:
            assert self.files is not None
            paths = [os.fspath(file) for file in self.files]
            top = len(os.path.commonpath([os.path.dirname(path) for path in paths]))  # the set may be moved
            for path in paths:
                stat = os.stat(path)
                digest.update(f"{path[top:]}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def load(
    name: str,
    root: str | Path | None = None,
    seed: int = 0,
    memory_limit_mb: int = 2048,
    *,
    on_error: str = "raise",
    download: bool = False,
    size: int = 32,
    train_size: int = 8192,
    val_size: int = 2048,
    years: str = "07+12",
    **boxes: object,
) -> tuple[ImageSet, ImageSet | None]:
    """Load the training and the validation set called ``name``.

    Parameters
    ----------
    name : str
        One of ``NAMES`` or ``WITH_BOXES``.
    root : str or Path, optional
        Where the set is: a folder, for ``npz`` the archive; ``photos`` needs none.
    seed : int
        Decides which patches ``photos`` cuts. It is not the training seed: runs that differ in that seed only
        are to see the same images.
    memory_limit_mb : int
        A split of ``folder`` or ``imagenet`` is decoded into memory once, if its images have one size and
        take at most this many MB (2**20 bytes). The other sets always live in memory.
    on_error : {"raise", "skip"}
        What a damaged file does while a folder is decoded into memory: raise at once, or leave the split on
        disk, where ``ImageSet.read`` raises for this one image and the caller can go on.
    download : bool
        Let torchvision download a set that is missing.
    size, train_size, val_size : int
        Side in pixels and numbers of ``photos``' patches.
    years : str
        Of ``voc``, see ``sslzoo.data.boxes``.
    **boxes
        What else the sets with boxes are told of their labels; it does not matter to their images.

    Returns
    -------
    train : ImageSet
    val : ImageSet or None
        None for a set without labels, and where there is no validation split.

    Raises
    ------
    UserError
        The name is unknown, or the set is missing or not in the expected layout.
    CorruptImage
        A file is damaged and ``on_error`` is "raise".
    """
    if boxes and name not in WITH_BOXES:
        raise TypeError(f"data={name} has no {', '.join(boxes)}")
    if name in WITH_BOXES:
        return _into_memory(_without_boxes(name, root, years), memory_limit_mb, on_error), None
    if name not in NAMES:
        known = ", ".join((*NAMES, *WITH_BOXES))
        raise UserError(f"data.name is {name!r}, but there is no such set; pass one of: {known}")
    if name == "photos":
        return _photos(size, train_size, val_size, seed)
    if root is None:
        what = "an .npz archive" if name == "npz" else "a folder"
        raise UserError(f"data.root is null, but data={name} needs {what}; pass data.root=PATH")
    root = Path(root).expanduser()
    if name == "npz":
        return _npz(root)
    if name in TORCHVISION:
        return _torchvision(name, root, download)
    train, val = _folder(name, root)
    train = _into_memory(train, memory_limit_mb, on_error)
    return train, None if val is None else _into_memory(val, memory_limit_mb, on_error)


def _photos(size: int, train_size: int, val_size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    classes = list(photos.PHOTOS)
    for key, value in (("train_size", train_size), ("val_size", val_size)):
        if value < len(classes):
            raise UserError(
                f"data.{key} is {value}, but photos has {len(classes)} classes; pass {len(classes)} or more"
            )
    sources = photos.read_photos()
    train = photos.cut(sources, train_size, validation=False, size=size, seed=seed)
    val = photos.cut(sources, val_size, validation=True, size=size, seed=seed)
    return (
        ImageSet(train.labels, classes, train.images, None, "photos"),
        ImageSet(val.labels, classes, val.images, None, "photos"),
    )


# ---- torchvision ----


def _torchvision(name: str, root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10 and -100, STL-10 (its unlabelled images join the training set), SVHN and Fashion-MNIST."""
    from torchvision import datasets  # a second to import, which the other sets need not wait for

    sets: dict[str, tuple[type, dict, dict, str]] = {
        # class, arguments of the training and of the validation split, where it keeps the labels
        "cifar10": (datasets.CIFAR10, {"train": True}, {"train": False}, "targets"),
        "cifar100": (datasets.CIFAR100, {"train": True}, {"train": False}, "targets"),
        "stl10": (datasets.STL10, {"split": "train+unlabeled"}, {"split": "test"}, "labels"),
        "svhn": (datasets.SVHN, {"split": "train"}, {"split": "test"}, "labels"),
        "fashion_mnist": (datasets.FashionMNIST, {"train": True}, {"train": False}, "targets"),
    }
    make, *options, labels = sets[name]
    try:
        splits = [make(root, download=download, **split) for split in options]
    except (RuntimeError, OSError, EOFError) as error:  # not there, cut short, no network, no space
        says = " ".join(str(error).split())
        fix = f"the download failed: {says}" if download else "pass data.download=true to get it"
        raise UserError(f"data={name} is missing or incomplete under data.root={root}; {fix}") from error
    classes = [str(digit) for digit in range(10)] if name == "svhn" else list(splits[0].classes)
    train, val = (
        ImageSet(np.asarray(getattr(split, labels), np.int64), classes, _rgb(split.data), None, name)
        for split in splits
    )
    return train, val


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 images (N, H, W), (N, 3, H, W) or (N, H, W, 3) -> (N, H, W, 3), C-contiguous."""
    pixels = np.asarray(pixels)
    if pixels.ndim == 3:
        return np.repeat(pixels[..., None], 3, axis=3)
    if pixels.shape[3] != 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels)


# ---- npz ----


def _npz(file: Path) -> tuple[ImageSet, ImageSet | None]:
    """A MedMNIST archive: {train,val,test}_images and _labels; the test arrays are left alone."""
    if not zipfile.is_zipfile(file):
        state = "is no .npz archive" if file.is_file() else "is no file"
        raise UserError(f"data.root={file} {state}; data=npz needs the path of one, written by np.savez")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if key.startswith(("train_", "val_"))}
            found = ", ".join(archive.files)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        says = " ".join(str(error).split())
        raise UserError(f"{file} is damaged or holds more than plain arrays ({says}); write it anew") from error
    splits = ["train", "val"] if any(key.startswith("val_") for key in arrays) else ["train"]
    for key in (f"{split}_{part}" for split in splits for part in ("images", "labels")):
        if key not in arrays:
            raise UserError(f"{file} has no array {key}, only: {found}; add it, or rename the one that is meant")
    images = {split: _npz_images(file, f"{split}_images", arrays[f"{split}_images"]) for split in splits}
    labels = {
        split: _npz_labels(file, f"{split}_labels", arrays[f"{split}_labels"], len(images[split])) for split in splits
    }
    classes = [str(k) for k in range(labels["train"].max() + 1)]
    if "val" in splits and (unknown := set(labels["val"].tolist()) - set(labels["train"].tolist())):
        raise UserError(f"{file}: val_labels has class {min(unknown)}, which train_labels lacks; take it out of val")
    sets = [ImageSet(labels[split], classes, images[split], None, "npz") for split in splits]
    return sets[0], sets[1] if "val" in splits else None


def _npz_images(file: Path, key: str, images: np.ndarray) -> np.ndarray:
    gray, color = images.ndim == 3, images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (gray or color) or images.size == 0:
        raise UserError(
            f"{file}: {key} is {images.dtype} of shape {images.shape}; "
            "store it as uint8 of shape (N, H, W) or (N, H, W, 3)"
        )
    return _rgb(images)


def _npz_labels(file: Path, key: str, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise UserError(
            f"{file}: {key} has shape {labels.shape}, which is multi-label; "
            "store one class number an image, of shape (N,)"
        )
    if labels.dtype.kind not in "iu" or labels.size != count or labels.min() < 0:
        raise UserError(
            f"{file}: {key} is {labels.dtype} of shape {labels.shape}; "
            f"store one class number from 0 for each of the {count} images"
        )
    return labels.reshape(-1).astype(np.int64)


# ---- folders ----


def _folder(name: str, root: Path) -> tuple[ImageSet, ImageSet | None]:
    """A tree on disk: train/CLASS and val/CLASS, or (``folder`` only) any tree without labels."""
    if not root.is_dir():
        raise UserError(f"data.root={root} is no folder; {LAYOUT}")
    train, val = root / "train", root / "val"
    if name == "imagenet" and not (train.is_dir() and val.is_dir()):
        raise UserError(f"{val if train.is_dir() else train} is no folder; {LAYOUT}")
    if val.is_dir() and not train.is_dir():
        raise UserError(f"data.root={root} has val/ but no train/; {LAYOUT}, or a tree without either")

    top = train if train.is_dir() else root
    classes = _classes(top) if top == train else []
    if not classes:
        if name == "imagenet":
            raise UserError(f"{train} has no class folders; {LAYOUT}")
        if val.is_dir() and _classes(val):
            raise UserError(f"{val} has class folders but {train} has none; {LAYOUT}")
        return _unlabelled(top, name), None
    return _labelled(train, classes, name), _labelled(val, classes, name) if val.is_dir() else None


def _classes(split: Path) -> list[str]:
    """Names of the class folders of train/ or val/, sorted; none where images lie in it directly."""
    entries = [entry for entry in os.scandir(split) if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if entry.is_file() and _is_image(entry.name))
    if classes and loose:
        raise UserError(f"{split} holds class folders and loose images ({loose[0]}, ...); {LAYOUT}")
    return classes


def _labelled(split: Path, classes: list[str], name: str) -> ImageSet:
    """The images of one split; ``classes`` are the training split's."""
    own = _classes(split)
    if not own:
        raise UserError(f"{split} has no class folders; {LAYOUT}")
    if unknown := sorted(set(own) - set(classes)):
        raise UserError(f"{split / unknown[0]} is a class that train/ lacks; add it to train/ or remove it")
    files, labels = [], []
    for label, class_ in enumerate(classes):
        if class_ in own:
            found = _images_below(split / class_)
            files += found
            labels += [label] * len(found)
    return ImageSet(np.array(labels, np.int64), classes, None, files, name)


def _without_boxes(name: str, root: str | Path | None, years: str) -> ImageSet:
    """The images of a set with boxes."""
    from sslzoo.data.boxes import training_pictures

    files = [file for file in training_pictures(name, root, years) if _is_image(file.name)]
    if not files:
        raise UserError(f"data={name} has no training images ({' '.join(SUFFIXES)}) under data.root={root}; add some")
    return ImageSet(np.full(len(files), -1, np.int64), [], None, files, name)


def _unlabelled(top: Path, name: str) -> ImageSet:
    files = _images_below(top)
    return ImageSet(np.full(len(files), -1, np.int64), [], None, files, name)


def _images_below(folder: Path) -> list[Path]:
    """All images in a folder and its sub-folders, in an order that does not depend on the file system."""
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))  # in place: where os.walk goes next
        files += [Path(parent, name) for name in sorted(names) if _is_image(name)]
    if not files:
        raise UserError(f"{folder} has no images ({' '.join(SUFFIXES)}); add some, or remove the folder")
    return files


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _into_memory(split: ImageSet, limit_mb: int, on_error: str) -> ImageSet:
    """The same set decoded, where all images have one size and fit; else the set as it is, on disk."""
    try:
        shape = split.read(0).shape
        if len(split) * np.prod(shape, dtype=int) > limit_mb * 2**20:
            return split
        images = np.empty((len(split), *shape), np.uint8)

        def decode_into(i: int) -> bool:
            image = split.read(i)
            if image.shape == shape:
                images[i] = image
            return image.shape == shape

        with ThreadPoolExecutor() as pool:  # decoders release the GIL
            results = pool.map(decode_into, range(len(split)))
            one_size = all(results)  # stops at the first that differs
            pool.shutdown(cancel_futures=True)
    except CorruptImage:
        if on_error == "raise":
            raise
        return split
    return ImageSet(split.labels, split.classes, images, split.files, split.name) if one_size else split
