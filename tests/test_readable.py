"""Held-out pictures that cannot be read: which are left out, how often they are read, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from boxed import content, write_coco, write_voc
from pointed import CORNERS, faces, write_corners, write_faces
from sslzoo.data.boxes import load_boxes
from sslzoo.data.faces import load_faces
from sslzoo.data.maps import load_maps
from sslzoo.data.point_sets import load_points
from sslzoo.data.readable import readable
from sslzoo.errors import UserError


@pytest.fixture
def damaged(tmp_path):
    """Three held-out pictures, the second of which is cut short."""
    root = write_coco(tmp_path, train=content())
    cut_short(root / "val2017" / "a.png")
    return load_boxes("coco", root)[1]


def cut_short(file) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def test_damaged_pictures_are_left_out_with_their_objects_and_counted(damaged):
    kept, files = readable(damaged, "skip")
    assert [file.name for file in files] == ["a.png"]
    assert kept.image_ids == [139, 285]
    assert np.array_equal(kept.xywh, damaged.xywh)  # image 7 has no object
    assert kept.skipped == {"unreadable held-out image": 1}
    assert not damaged.skipped
    wrong, _ = readable(damaged.subset(np.array([1, 2, 0])), "skip")
    assert wrong.image_ids == [285, 139]
    assert [each["labels"].tolist() for each in map(wrong.target, (0, 1))] == [
        damaged.target(2)["labels"].tolist(),
        damaged.target(0)["labels"].tolist(),
    ]


def test_a_picture_of_another_size_than_annotated_is_left_out_too(damaged):
    Image.new("RGB", (9, 9)).save(damaged.files[2])
    assert readable(damaged, "skip")[0].image_ids == [139]


def test_without_skipping_the_first_damaged_picture_is_named(damaged):
    with pytest.raises(UserError, match=r"a\.png cannot be decoded .* data\.on_error=skip"):
        readable(damaged, "raise")


def test_a_set_without_a_readable_picture_is_refused(damaged):
    with pytest.raises(UserError, match=r"no held-out image of data=coco can be read, e\.g\. .*a\.png"):
        readable(damaged.subset(np.array([1])), "skip")


def test_sound_sets_stay_as_they_are(tmp_path):
    val = load_boxes("coco", write_coco(tmp_path / "coco"))[1]
    assert readable(val, "raise") == (val, [])
    val = load_faces(write_faces(tmp_path / "faces", faces(8)))[1]
    assert readable(val, "skip")[0] is val


def test_all_objects_of_a_damaged_picture_are_left_out_and_it_is_read_once(tmp_path):
    root = write_corners(tmp_path)
    settings = {"name": "coco", "root": root, "annotations": "instances", "label_fraction": 1.0}
    val = load_points(settings | {"class_agnostic": False, "on_error": "skip"})[1]
    assert len(val.names) == len(CORNERS)
    broken = val.files[0]
    cut_short(broken)
    read = []

    def picture(row):
        read.append(val.files[row])
        return val.picture(row)

    kept, files = readable(val, "skip", picture)
    assert files == [broken]
    assert sorted(read) == sorted(set(val.files))
    assert len(kept) == sum(file != broken for file in val.files) < len(val) - 1
    places = [k for k, file in enumerate(val.files) if file != broken]
    assert np.array_equal(kept.points, val.points[places])
    assert np.array_equal(kept.picture(0), val.picture(places[0]))
    assert kept.skipped == {"unreadable held-out image": 1}


def test_a_damaged_class_map_is_no_truth(tmp_path):
    objects = {name: [("dog", 0, 5, 5, 20, 20)] for name in ("a", "b", "c")}
    lists = {"train": ["a"], "val": ["b", "c"]}
    root = write_voc(tmp_path, 2012, lists, objects, segmentation={name: {"dog": 12} for name in objects})
    settings = {"name": "voc", "root": root, "annotations": "instances", "years": "2012", "classes": None}
    val = load_maps(settings | {"label_fraction": 1.0, "class_agnostic": False, "on_error": "skip"})[1]
    cut_short(val.class_maps[0])
    kept, files = readable(val, "skip", lambda row: (val.picture(row), val.class_map(row)))
    assert (kept.image_ids, files) == (["c"], [val.files[0]])
