"""Cityscapes: its 34 classes become 19, and what is wrong with a tree is said by name."""

import numpy as np
import pytest
from PIL import Image

from sslzoo.data.cityscapes import CLASSES, read_cityscapes
from sslzoo.data.maps import load_maps
from sslzoo.errors import UserError

# From the set's own table: number, and number in training
PUBLISHED = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip


def write_cityscapes(root, train=3, val=2, size=(48, 64), kinds=("labelIds",)):
    """Street scenes of noise; ``kinds`` of class maps, in which every class occurs. Returns ``root``."""
    rng = np.random.default_rng(0)
    for split, cities, count in (("train", ("aachen", "bremen"), train), ("val", ("frankfurt",), val)):
        for k in range(count):
            city = cities[k % len(cities)]
            name = f"{city}_{k:06d}_000019"
            pictures, maps = (root / top / split / city for top in ("leftImg8bit", "gtFine"))
            pictures.mkdir(parents=True, exist_ok=True)
            maps.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(pictures / f"{name}_leftImg8bit.png")
            ids = (np.arange(size[0] * size[1]).reshape(size) // 40 % 34).astype(np.uint8)
            train_ids = np.array([PUBLISHED.get(i, 255) for i in range(34)], np.uint8)[ids]
            for kind in kinds:
                values = ids if kind == "labelIds" else train_ids
                Image.fromarray(values).save(maps / f"{name}_gtFine_{kind}.png")
    return root


def settings(root, **more):
    return {"name": "cityscapes", "root": root, "label_fraction": 1.0, "on_error": "raise", "batch_size": 2, **more}


@pytest.mark.parametrize("kinds", [("labelIds",), ("labelTrainIds",), ("labelIds", "labelTrainIds")])
def test_class_maps_have_the_19_classes_by_their_published_numbers(tmp_path, kinds):
    train, val = load_maps(settings(write_cityscapes(tmp_path, kinds=kinds)))
    assert (len(train), len(val)) == (3, 2)
    assert train.image_ids == ["aachen_000000_000019", "aachen_000002_000019", "bremen_000001_000019"]
    assert len(train.map_classes) == 19
    found = train.class_map(0).numpy()
    ids = np.arange(48 * 64).reshape(48, 64) // 40 % 34
    assert set(np.unique(found)) == {*range(19), 255}
    for i in range(34):
        assert set(found[ids == i].tolist()) == {PUBLISHED.get(i, 255)}
    assert [train.map_classes[PUBLISHED[i]] for i in (7, 19, 26, 33)] == ["road", "traffic light", "car", "bicycle"]
    assert sorted(CLASSES) == sorted(PUBLISHED)
    assert train.picture(0).shape == (48, 64, 3)
    assert train.files[0].stem.startswith(train.image_ids[0])


def test_a_part_of_the_labels_is_a_part_of_the_images(tmp_path):
    root = write_cityscapes(tmp_path, train=6)
    train, val = load_maps(settings(root, label_fraction=0.5), seed=1)
    assert (len(train), len(train.sizes), len(val)) == (3, 3, 2)
    whole, _ = load_maps(settings(root))
    assert set(train.image_ids) < set(whole.image_ids)
    assert all(image in file.name and image in found.name
               for image, file, found in zip(train.image_ids, train.files, train.maps, strict=True))  # fmt: skip


def test_a_photograph_without_a_map_is_named_or_left_out(tmp_path):
    root = write_cityscapes(tmp_path)
    next((root / "gtFine" / "train" / "bremen").iterdir()).unlink()
    with pytest.raises(UserError, match=r"bremen_000001_\w+.png has no class map in gtFine/train/bremen"):
        read_cityscapes(root, "train")
    train = read_cityscapes(root, "train", on_error="skip")
    assert len(train) == 2
    assert train.skipped == {"missing class map": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: np.full_like(values, 40), "has class 40, but labelIds go from 0 to 33, and 255"),
        (lambda values: values[:20], "is L of 64 x 20 pixels; give a picture of class numbers"),
        (lambda values: np.stack([values] * 3, 2), "is RGB of 64 x 48 pixels"),
    ],
)
def test_a_map_that_does_not_fit_is_named(tmp_path, change, message):
    train = read_cityscapes(write_cityscapes(tmp_path), "train")
    file = train.maps[0]
    Image.fromarray(change(np.asarray(Image.open(file)))).save(file)
    with pytest.raises(UserError, match=message) as error:
        train.class_map(0)
    assert str(file) in str(error.value)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match="is no picture, or cut short"):
        train.class_map(0)


@pytest.mark.parametrize(
    ("root", "message"), [(None, "data.root is null"), ("nowhere", "has no images in leftImg8bit/train; expected")]
)
def test_a_folder_that_is_no_cityscapes_is_told_its_layout(tmp_path, root, message):
    with pytest.raises(UserError, match=message):
        read_cityscapes(root and tmp_path / root, "train")
