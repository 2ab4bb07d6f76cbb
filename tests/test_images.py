"""Image sets: every odd file becomes 8-bit RGB or one clear error; every wrong layout names the fix."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sslzoo.data.decode import ORIENTATION, CorruptImage, decode
from sslzoo.data.images import NAMES, load
from sslzoo.errors import UserError

CONF = Path(__file__).parent.parent / "conf" / "data"


def smooth(height=24, width=40):
    """A colour picture without high frequencies, so that JPEG keeps it to within a few gray levels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 6, y * 10, 255 - x * 3 - y * 5], axis=2).astype(np.uint8)


def write(path, pixels=None, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(smooth() if pixels is None else pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def oriented(path, tag, **options):
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    return write(path, exif=exif, **options)


def one_line(error, *parts):
    """The message is one line and has each of ``parts``: what was got, where, and what to type."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# ---- decoding ----


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "TIF", "PNG"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    pixels = decode(write(tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(pixels, smooth())
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_lossless_webp_keeps_every_pixel(tmp_path):
    np.testing.assert_array_equal(decode(write(tmp_path / "a.webp", lossless=True)), smooth())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}])
def test_jpeg_equals_pillow(tmp_path, options):
    file = write(tmp_path / "a.jpg", quality=95, **options)
    difference = decode(file).astype(int) - np.asarray(Image.open(file).convert("RGB"))
    assert np.abs(difference).max() <= 2  # two builds of libjpeg may round differently


def test_gray_is_repeated(tmp_path):
    gray = smooth()[..., 0]
    for file in (write(tmp_path / "a.png", gray), write(tmp_path / "a.jpg", gray, quality=100)):
        pixels = decode(file)
        assert np.abs(pixels[..., 1].astype(int) - gray).max() <= 3
        assert (pixels == pixels[..., :1]).all()


def test_palette_becomes_its_colours(tmp_path):
    expected = np.asarray(Image.fromarray(smooth()).quantize(16).convert("RGB"))
    Image.fromarray(smooth()).quantize(16).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_pixels_are_composited_over_white(tmp_path, suffix):
    rgba = np.dstack([smooth(), np.full((24, 40), 255, np.uint8)])
    rgba[:, :20, 3] = 0
    options = {"lossless": True} if suffix == "webp" else {}
    pixels = decode(write(tmp_path / f"a.{suffix}", rgba, **options))
    assert (pixels[:, :20] == 255).all()
    np.testing.assert_array_equal(pixels[:, 20:], smooth()[:, 20:])


def test_half_transparent_gray_and_palette_pixels_are_lightened(tmp_path):
    gray_alpha = np.dstack([np.zeros((8, 8), np.uint8), np.full((8, 8), 128, np.uint8)])
    assert (decode(write(tmp_path / "la.png", gray_alpha)) == 127).all()
    palette = Image.new("P", (8, 8), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    assert (decode(tmp_path / "p.png") == 255).all()


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    pixels = decode(write(tmp_path / "a.jpg", mode="CMYK", quality=100))
    assert np.abs(pixels.astype(int) - smooth()).mean() < 3


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix, byte_order):
    deep = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(byte_order)
    pixels = decode(write(tmp_path / f"a.{suffix}", deep))
    np.testing.assert_array_equal(pixels[..., 0], np.round(deep / 257).astype(np.uint8))
    assert pixels.shape == (24, 40, 3)


def test_32_bit_pixels_are_refused_not_clipped(tmp_path):
    with pytest.raises(CorruptImage) as error:
        decode(write(tmp_path / "a.tif", np.ones((4, 4), np.float32)))
    one_line(error, tmp_path / "a.tif", "32-bit", "save 8 or 16 bits")


STORED = {  # what the camera stores, for each tag, when the scene is `a`
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("tag", STORED)
def test_exif_orientation_is_undone(tmp_path, suffix, tag):
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    file = oriented(tmp_path / f"a.{suffix}", tag, pixels=np.ascontiguousarray(STORED[tag](smooth())), **options)
    pixels = decode(file)
    assert pixels.flags.c_contiguous
    assert pixels.shape == smooth().shape
    assert np.abs(pixels.astype(int) - smooth()).max() <= 4


def test_an_unknown_orientation_is_ignored(tmp_path):
    assert decode(oriented(tmp_path / "a.jpg", 9)).shape == (24, 40, 3)


def test_a_wrong_suffix_does_not_matter(tmp_path):
    write(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(decode(tmp_path / "a.jpg"), smooth())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}])
@pytest.mark.parametrize("missing", [1, 2, 3, 40, 0.3, 0.5, 0.9])
def test_a_truncated_jpeg_is_an_error(tmp_path, options, missing):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = write(tmp_path / "a.jpg", noise, **options)
    data = file.read_bytes()
    file.write_bytes(data[: -missing if missing >= 1 else int(len(data) * (1 - missing))])
    with pytest.raises(CorruptImage) as error:
        decode(file)
    one_line(error, file, "data.on_error=skip")


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "jpg"])
def test_half_a_file_is_an_error_in_every_format(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = write(tmp_path / f"a.{suffix}", noise, mode="CMYK" if suffix == "jpg" else None)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptImage) as error:
        decode(file)
    one_line(error, file, "data.on_error=skip")


def test_damage_inside_a_jpeg_is_an_error_although_pillow_decodes_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = write(tmp_path / "a.jpg", noise)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    file.write_bytes(data)
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(CorruptImage):
        decode(file)


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"hello, not a picture", "not a known picture")])
def test_a_file_that_is_no_picture_is_an_error(tmp_path, data, reason):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(CorruptImage) as error:
        decode(tmp_path / "a.jpg")
    one_line(error, tmp_path / "a.jpg", reason, "data.on_error=skip")


def test_a_file_that_vanished_is_an_error(tmp_path):
    with pytest.raises(CorruptImage) as error:
        decode(tmp_path / "gone.png")
    one_line(error, tmp_path / "gone.png", "No such file")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_decompression_bomb_is_an_error(tmp_path, suffix, monkeypatch):
    file = write(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40 // 2 - 1)
    with pytest.raises(CorruptImage) as error:
        decode(file)
    one_line(error, file, "limit")


# ---- folders ----


def tree(root, **splits):
    """``tree(root, train={"cat": 2})`` writes root/train/cat/{0,1}.png, each of its own colour."""
    colour = 0
    for split, classes in splits.items():
        for class_, count in classes.items():
            for i in range(count):
                write(root / split / class_ / f"{i}.png", np.full((8, 8, 3), colour, np.uint8))
                colour += 1
    return root


def test_class_folders_give_labels_in_sorted_order(tmp_path):
    train, val = load("folder", tree(tmp_path, train={"dog": 2, "cat": 3}, val={"dog": 1}))
    assert train.classes == val.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert val.labels.tolist() == [1]  # the training split's number, though it is val's only class
    assert train.labels.dtype == np.int64
    assert [int(train.read(i)[0, 0, 0]) for i in range(5)] == [2, 3, 4, 0, 1]


def test_train_without_val_is_fine(tmp_path):
    train, val = load("folder", tree(tmp_path, train={"cat": 2}))
    assert len(train) == 2
    assert val is None


def test_imagenet_is_the_same_layout(tmp_path):
    train, val = load("imagenet", tree(tmp_path, train={"n01": 2, "n02": 1}, val={"n01": 1, "n02": 1}))
    assert (len(train), len(val), train.name) == (3, 2, "imagenet")


@pytest.mark.parametrize("below", ["", "train"])
def test_a_tree_without_classes_is_unlabelled_and_searched_to_any_depth(tmp_path, below):
    top = tmp_path / below
    names = ["b.JPG", "a.jpeg", "c.webp", "d.TIF", "e.tiff", "f.bmp", "g.png"]
    for name in names:
        write(top / name)
    (top / "notes.txt").write_text("no picture")
    write(top / ".hidden.png")
    write(top / "._b.png")
    if not below:
        write(top / "z" / "y" / "x.png")
        write(top / ".cache" / "thumbnail.png")
        names.append("x.png")
    train, val = load("folder", tmp_path, memory_limit_mb=0)
    assert sorted(file.name for file in train.files) == sorted(names)
    assert train.files == load("folder", tmp_path, memory_limit_mb=0)[0].files
    assert (train.labels == -1).all()
    assert train.classes == []
    assert val is None


def test_the_order_of_rows_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    root = tree(tmp_path, train={"b": 2, "a": 2})
    write(root / "train" / "a" / "deep" / "0.png")
    files = load("folder", root, memory_limit_mb=0)[0].files
    walk = os.walk

    def backwards(top, **options):
        for parent, folders, names in walk(top, **options):
            folders.reverse()
            yield parent, folders, names[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert load("folder", root, memory_limit_mb=0)[0].files == files


def test_one_size_and_room_means_memory_else_disk(tmp_path):
    root = tree(tmp_path, train={"cat": 3, "dog": 2})
    inside, _ = load("folder", root)
    outside, _ = load("folder", root, memory_limit_mb=0)
    assert inside.images.shape == (5, 8, 8, 3)
    assert outside.images is None
    assert len(outside.files) == 5
    assert inside.files == outside.files
    for i in range(5):
        np.testing.assert_array_equal(inside.read(i), outside.read(i))
    write(root / "train" / "cat" / "larger.png", np.zeros((9, 8, 3), np.uint8))
    assert load("folder", root)[0].images is None


def test_a_damaged_file_stops_the_load_or_leaves_the_set_on_disk(tmp_path):
    root = tree(tmp_path, train={"cat": 3})
    bad = root / "train" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(CorruptImage) as error:
        load("folder", root)
    one_line(error, bad, "data.on_error=skip")
    train, _ = load("folder", root, on_error="skip")
    assert train.read(0).shape == train.read(2).shape == (8, 8, 3)
    with pytest.raises(CorruptImage):
        train.read(1)


def test_fingerprint_follows_the_set_not_its_place(tmp_path):
    root = tree(tmp_path / "a", train={"cat": 2, "dog": 1})
    before = {mb: load("folder", root, memory_limit_mb=mb)[0].fingerprint() for mb in (0, 100)}
    moved = root.rename(tmp_path / "b")
    for mb, fingerprint in before.items():
        assert load("folder", moved, memory_limit_mb=mb)[0].fingerprint() == fingerprint
    write(moved / "train" / "cat" / "0.png", np.full((8, 8, 3), 77, np.uint8))
    for mb, fingerprint in before.items():
        assert load("folder", moved, memory_limit_mb=mb)[0].fingerprint() != fingerprint


def bad_folders(root):
    """(name, root, parts of the message) of each layout that must be refused."""
    yield "folder", root / "nowhere", [root / "nowhere", "train/CLASS"]
    (root / "empty").mkdir()
    yield "folder", root / "empty", [root / "empty", "no images"]
    tree(root / "a", train={"cat": 1})
    (root / "a" / "train" / "dog").mkdir()
    yield "folder", root / "a", [root / "a" / "train" / "dog", "no images"]
    tree(root / "b", train={"cat": 1}, val={"cat": 1, "owl": 1})
    yield "folder", root / "b", [root / "b" / "val" / "owl", "train/ lacks"]
    tree(root / "c", val={"cat": 1})
    yield "folder", root / "c", [root / "c", "no train/", "train/CLASS"]
    tree(root / "d", train={"cat": 1, "": 1})
    yield "folder", root / "d", [root / "d" / "train", "0.png", "train/CLASS"]
    tree(root / "e", train={"": 1}, val={"cat": 1})
    yield "folder", root / "e", [root / "e" / "val", "train/CLASS"]
    tree(root / "f", train={"cat": 1}, val={"": 1})
    yield "folder", root / "f", [root / "f" / "val", "train/CLASS"]
    (root / "g" / "train").mkdir(parents=True)
    yield "folder", root / "g", [root / "g" / "train", "no images"]
    yield "imagenet", root / "f", [root / "f" / "val", "val/CLASS"]
    tree(root / "h", train={"n01": 1})
    yield "imagenet", root / "h", [root / "h" / "val", "val/CLASS"]
    yield "imagenet", root / "c", [root / "c" / "train", "train/CLASS"]
    tree(root / "i", train={"": 1}, val={"": 1})
    yield "imagenet", root / "i", [root / "i" / "train", "train/CLASS"]


def test_each_wrong_layout_is_one_line_that_names_the_place(tmp_path):
    for name, root, parts in bad_folders(tmp_path):
        with pytest.raises(UserError) as error:
            load(name, root)
        one_line(error, *parts)


# ---- npz ----


def archive(path, **changes):
    """A small MedMNIST archive; a change of None leaves that array out."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 3
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_npz_reads_images_and_labels(tmp_path):
    train, val = load("npz", archive(tmp_path / "a.npz"))
    assert train.images.shape == (6, 28, 28, 3)
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert train.classes == val.classes == ["0", "1", "2"]
    assert len(val) == 3


def test_npz_takes_gray_images_flat_labels_and_no_val(tmp_path):
    gray = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
    labels = np.arange(6)
    file = archive(tmp_path / "a.npz", train_images=gray, train_labels=labels, val_images=None, val_labels=None)
    train, val = load("npz", file)
    np.testing.assert_array_equal(train.images, np.stack([gray] * 3, axis=3))
    assert train.labels.tolist() == list(range(6))
    assert val is None


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train_images": None}, ["no array train_images", "train_labels", "add it"]),
        ({"val_labels": None}, ["no array val_labels", "add it"]),
        ({"train_images": np.zeros((6, 28, 28), np.float32)}, ["train_images", "float32", "uint8"]),
        ({"train_images": np.zeros((6, 28, 28, 28), np.uint8)}, ["(6, 28, 28, 28)", "(N, H, W, 3)"]),
        ({"train_images": np.zeros((0, 28, 28), np.uint8)}, ["(0, 28, 28)"]),
        ({"train_labels": np.zeros((6, 14), int)}, ["(6, 14)", "multi-label"]),
        ({"train_labels": np.zeros(5, int)}, ["train_labels", "(5,)", "6 images"]),
        ({"train_labels": np.zeros(6)}, ["train_labels", "float64"]),
        ({"train_labels": np.array([0, 1, 2, 0, 1, -1])}, ["train_labels", "from 0"]),
        ({"val_labels": np.array([0, 1, 7])}, ["val_labels", "7", "train_labels lacks"]),
        ({"train_labels": np.array(["cat"] * 6, object)}, ["plain arrays", "write it anew"]),
    ],
)
def test_npz_with_wrong_arrays_is_one_line(tmp_path, changes, parts):
    file = archive(tmp_path / "a.npz", **changes)
    with pytest.raises(UserError) as error:
        load("npz", file)
    one_line(error, file, *parts)


@pytest.mark.parametrize("data", [None, b"", b"not a zip", "half"])
def test_npz_that_is_no_archive_is_one_line(tmp_path, data):
    file = tmp_path / "a.npz"
    if data == "half":
        archive(file)
        file.write_bytes(file.read_bytes()[:3000])
    elif data is not None:
        file.write_bytes(data)
    with pytest.raises(UserError) as error:
        load("npz", file)
    one_line(error, file, "no file" if data is None else "no .npz archive", "np.savez")


def test_npz_of_one_plain_array_is_one_line(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError) as error:
        load("npz", tmp_path / "a.npy")
    one_line(error, tmp_path / "a.npy", "np.savez")


# ---- torchvision ----


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's own files with two images a batch; torchvision's md5 check of the real ones is off."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 8]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *file: True)
    return tmp_path


def test_cifar10_keeps_pixels_labels_and_class_names(cifar):
    train, val = load("cifar10", cifar)
    first = pickle.loads((cifar / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"][0]
    np.testing.assert_array_equal(train.read(0), first.reshape(3, 32, 32).transpose(1, 2, 0))
    assert (train.images.shape, val.images.shape) == ((10, 32, 32, 3), (2, 32, 32, 3))
    assert train.images.flags.c_contiguous
    assert train.labels.tolist() == [3, 8] * 5
    assert train.classes[3] == "d"


def idx(array):
    """An array in the IDX format of MNIST."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def test_fashion_mnist_is_gray_repeated_at_28_pixels(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    gray = np.arange(2 * 28 * 28, dtype=np.uint32).reshape(2, 28, 28).astype(np.uint8)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(gray))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.array([9, 0], np.uint8)))
    train, val = load("fashion_mnist", tmp_path)
    np.testing.assert_array_equal(train.images, np.stack([gray] * 3, axis=3))
    assert train.labels.tolist() == val.labels.tolist() == [9, 0]
    assert len(train.classes) == 10


def test_svhn_is_turned_upright_and_named_by_digit(tmp_path, monkeypatch):
    from scipy.io import savemat

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 2), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[10], [4]], np.uint8)})
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *file: True)
    train, _ = load("svhn", tmp_path)
    np.testing.assert_array_equal(train.images, pixels.transpose(3, 0, 1, 2))
    assert train.labels.tolist() == [0, 4]  # the files call the digit zero 10
    assert train.classes == list("0123456789")


def test_stl10_trains_on_labelled_and_unlabelled_images(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    for file in ("train_X.bin", "test_X.bin", "unlabeled_X.bin"):
        pixels.tofile(folder / file)
    for file in ("train_y.bin", "test_y.bin"):
        np.array([1, 10], np.uint8).tofile(folder / file)
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0 1\n")
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *file: True)
    train, val = load("stl10", tmp_path)
    assert train.labels.tolist() == [0, 9, -1, -1]
    assert val.labels.tolist() == [0, 9]
    np.testing.assert_array_equal(train.images[2], pixels[0].transpose(2, 1, 0))  # STL-10 stores columns first


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn", "fashion_mnist"])
def test_a_missing_set_names_the_root_and_the_download_switch(tmp_path, name):
    with pytest.raises(UserError) as error:
        load(name, tmp_path)
    one_line(error, name, tmp_path, "data.download=true")


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(UserError) as error:
        load("cifar10", tmp_path, download=True)
    one_line(error, tmp_path, "no route to host")


# ---- names and options ----


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError) as error:
        load("cifar")
    one_line(error, "'cifar'", *NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "photos"])
def test_a_missing_root_says_what_to_type(name):
    with pytest.raises(UserError) as error:
        load(name)
    one_line(error, f"data={name}", "data.root=PATH")


def test_photos_smaller_than_their_classes_are_refused():
    with pytest.raises(UserError) as error:
        load("photos", val_size=3)
    one_line(error, "data.val_size is 3", "10 classes")


def test_every_name_has_a_config_with_the_same_keys():
    common = {
        "name",
        "root",
        "batch_size",
        "workers",
        "mean",
        "std",
        "on_error",
        "memory_limit_mb",
        "download",
    }
    for name in NAMES:
        config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        extra = {"train_size", "val_size", "size"} if name == "photos" else set()
        assert set(config) == common | extra
        assert config["name"] == name
        assert len(config["mean"]) == len(config["std"]) == 3


def test_the_photos_config_states_their_mean_and_deviation():
    config = yaml.safe_load((CONF / "photos.yaml").read_text())
    pixels = load("photos")[0].images / 255.0
    np.testing.assert_allclose(config["mean"], pixels.mean((0, 1, 2)), atol=2e-4)
    np.testing.assert_allclose(config["std"], pixels.std((0, 1, 2)), atol=2e-4)
