"""Sets with boxes: parts, one class, pictures as annotated, and what pretraining sees of them."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from boxed import content, picture, random_truth, rectangles, write_coco
from sslzoo.config import composed, plain
from sslzoo.data.boxes import NAMES, chosen, labelled_images, load_boxes, load_unlabelled
from sslzoo.data.decode import ORIENTATION
from sslzoo.data.images import load
from sslzoo.errors import UserError

CONF = Path(__file__).parent.parent / "conf" / "data"


def test_a_smaller_fraction_lies_in_a_larger_one_and_depends_on_the_seed():
    parts = [set(labelled_images(1000, fraction).tolist()) for fraction in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)]
    assert [len(part) for part in parts] == [10, 50, 100, 200, 500, 1000]
    assert all(small < large for small, large in pairwise(parts))
    assert set(labelled_images(1000, 0.1, seed=1).tolist()) != parts[2]


@pytest.mark.parametrize(("fraction", "says"), [(0, "no fraction"), (1.5, "no fraction"), (0.0001, "at least 0.01")])
def test_an_impossible_fraction_is_refused(fraction, says):
    with pytest.raises(UserError, match=says):
        labelled_images(100, fraction)


def test_a_subset_has_its_images_own_objects():
    rng = np.random.default_rng(0)
    whole = random_truth(rng, masks=True, points=2)
    chosen_images = rng.permutation(len(whole))[:7]
    part = whole.subset(chosen_images)
    assert len(part) == 7
    for k, i in enumerate(chosen_images):
        ours, theirs = (one.target(j, True, True) for one, j in ((part, k), (whole, i)))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert len(whole.subset(np.arange(0)).labels) == 0


def test_training_takes_the_fraction_and_validation_stays_whole(tmp_path):
    root = write_coco(tmp_path)
    train, val = load_boxes("coco", root, label_fraction=0.34)
    assert (len(train), len(val)) == (1, 3)


def test_class_agnostic_labels_are_all_1(tmp_path):
    train, val = load_boxes("coco", write_coco(tmp_path), class_agnostic=True)
    for one in (train, val):
        assert one.labels.tolist() == [1] * 4
        assert one.classes == ["object"]
        assert one.category_ids == [1]


def oriented(path, pixels, tag):
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    Image.fromarray(pixels).save(path, exif=exif)


def test_a_picture_is_taken_as_stored_unless_only_its_rotation_has_the_annotated_size(tmp_path):
    root, stored = write_coco(tmp_path), picture(30, 40, seed=1)
    train, _ = load_boxes("coco", root)
    oriented(root / "train2017" / "b.png", stored, 3)  # upside down: both have the annotated size
    np.testing.assert_array_equal(train.picture(0), stored)
    oriented(root / "train2017" / "b.png", stored.transpose(1, 0, 2).copy(), 5)  # lies on its side
    np.testing.assert_array_equal(train.picture(0), stored)


def test_gray_transparent_and_cmyk_pictures_are_rgb(tmp_path):
    root = write_coco(tmp_path)
    train, _ = load_boxes("coco", root)
    for mode, options in (("L", {}), ("RGBA", {}), ("P", {})):
        Image.fromarray(picture(30, 40)).convert(mode).save(root / "train2017" / "b.png", **options)
        assert train.picture(0).shape == (30, 40, 3)
    Image.fromarray(picture(30, 40)).convert("CMYK").save(root / "train2017" / "b.png", format="JPEG")
    assert train.picture(0).shape == (30, 40, 3)


def test_a_picture_of_another_size_is_named(tmp_path):
    root = write_coco(tmp_path)
    train, _ = load_boxes("coco", root)
    Image.fromarray(picture(31, 40)).save(root / "train2017" / "b.png")
    with pytest.raises(UserError, match=r"b\.png has 40 x 31 pixels, but image 139 is annotated with 40 x 30"):
        train.read(0)


def test_unknown_names_missing_roots_and_options_are_refused(tmp_path):
    with pytest.raises(UserError, match="data=photos has no boxes; choose one of data=coco, data=voc, data=scenes"):
        load_boxes("photos")
    with pytest.raises(UserError, match=r"data=coco needs a folder; pass data\.root=PATH"):
        load_boxes("coco")
    with pytest.raises(UserError, match=r"data\.on_error=maybe"):
        load_boxes("coco", write_coco(tmp_path), on_error="maybe")
    with pytest.raises(UserError, match="data=photos has no boxes"):
        chosen({"name": "photos"})


@pytest.mark.parametrize("name", NAMES)
def test_every_config_composes_and_names_what_the_loaders_take(name):
    config = composed([f"data={name}"])
    arguments = chosen(plain(config.data))
    assert arguments["name"] == name
    known = set(arguments) | {"batch_size", "workers", "mean", "std", "memory_limit_mb"}
    assert set(yaml.safe_load((CONF / f"{name}.yaml").read_text())) == known


def test_an_image_name_that_labelled_and_unlabelled_pictures_share_is_refused(tmp_path):
    root = write_coco(tmp_path, rectangles(tmp_path, "train", 8, 0), rectangles(tmp_path, "val", 4, 1))
    more = rectangles(root, "unlabeled", 4, 2) | {"annotations": []}
    file = root / "annotations" / "image_info_unlabeled2017.json"
    file.write_text(json.dumps(more))
    with pytest.raises(UserError, match="train2017 and unlabeled2017 both have an image 10"):
        load_unlabelled("coco", root, label_fraction=0.25)
    for image in more["images"]:
        image["id"] += 1
    file.write_text(json.dumps(more))
    assert len(load_unlabelled("coco", root, label_fraction=0.25)) == 6 + 4


def test_pretraining_sees_the_training_images_without_labels(tmp_path):
    root = write_coco(tmp_path)
    settings = plain(composed(["data=coco", f"data.root={root}"]).data)
    for key in ("mean", "std", "batch_size", "workers"):
        del settings[key]
    train, val = load(**settings)
    assert val is None
    assert [file.name for file in train.files] == ["a.png", "b.png", "c.png"]
    assert (train.labels == -1).all()
    with pytest.raises(TypeError, match="years_"):
        load("photos", years_="2007")


def test_annotations_of_another_prefix_are_read(tmp_path):
    root = write_coco(tmp_path, content())
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").rename(root / "annotations" / f"mine_{split}2017.json")
    assert len(load_boxes("coco", root, annotations="mine")[0]) == 3
