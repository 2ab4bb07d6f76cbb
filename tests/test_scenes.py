"""The built-in scenes: whole or not there, the same everywhere, honest splits, boxes that fit what is drawn."""

import hashlib
import os
from functools import cache

import numpy as np
import pytest

from sslzoo.data import photos, scenes
from sslzoo.data.boxes import load_boxes
from sslzoo.data.images import load
from sslzoo.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small set, of fewer pieces and backgrounds, which are cut once for the whole file."""
    patch = pytest.MonkeyPatch()
    patch.setattr(scenes, "PIECES", 80)
    patch.setattr(scenes, "GROUNDS", 60)
    patch.setattr(scenes, "_material", cache(scenes._material))
    top = tmp_path_factory.mktemp("scenes") / "small"
    scenes.write_scenes(top, train=60, val=20)
    yield top
    patch.undo()


def digest(top):
    files = sorted(file for file in top.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_the_real_loader_reads_them_without_a_fault(place):
    train, val = load_boxes("scenes", place, masks=True)
    assert (len(train), len(val)) == (60, 20)
    assert train.classes == list(scenes.CATEGORIES.values())
    assert train.category_ids == sorted(scenes.CATEGORIES)
    assert set(train.labels.tolist()) == set(range(1, 9))
    assert not train.crowd.any()
    assert (np.diff(train.starts) == 0).any()
    assert np.diff(train.starts).max() <= 4
    assert train.skipped == {}


def test_boxes_and_areas_are_those_of_the_masks(place):
    train, _ = load_boxes("scenes", place, masks=True)
    for i in range(20):
        image, target = train.read(i, with_masks=True, with_keypoints=True)
        assert image.shape[:2] == tuple(train.sizes[i]) == target["masks"].shape[1:]
        assert (target["masks"].sum(0) <= 1).all()
        assert target["masks"].sum((1, 2)).tolist() == target["area"].tolist()
        for mask, (x1, y1, x2, y2) in zip(target["masks"].numpy(), target["boxes"].tolist(), strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == [x1, y1, x2, y2]


def test_drawn_objects_have_four_keypoints_on_their_edge_and_cut_out_ones_none(place):
    train, _ = load_boxes("scenes", place, masks=True)
    assert [train.keypoint_names[k] for k in train.swap] == ["top", "right", "bottom", "left"]
    visible = 0
    for i in range(len(train)):
        target = train.target(i, with_masks=True, with_keypoints=True)
        for label, mask, points in zip(target["labels"], target["masks"], target["keypoints"], strict=True):
            if train.classes[label - 1] not in scenes.DRAWN:
                assert not points.any()
            for x, y, seen in points.tolist():
                if seen == 2:
                    x, y = round(x), round(y)
                    assert mask[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4].any()
                    visible += 1
    assert visible > 50


def test_the_same_bytes_come_out_again(place, tmp_path):
    scenes.write_scenes(tmp_path / "again", train=60, val=20)
    assert digest(tmp_path / "again") == digest(place)
    assert len(digest(place)) == 64


def test_no_pixel_of_a_photograph_is_in_both_splits(monkeypatch):
    """Training pixels painted red, held-out ones blue."""
    painted = []
    for photo in photos.read_photos():
        held = photos.held_out(*photo.shape[:2])[..., None]
        noise = np.random.default_rng(0).integers(60, 256, (*photo.shape[:2], 1), dtype=np.uint8)
        painted.append(noise * np.where(held, np.array([0, 0, 1], np.uint8), np.array([1, 0, 0], np.uint8)))
    monkeypatch.setattr(photos, "read_photos", lambda: painted)
    monkeypatch.setattr(photos, "FLAT", 0)
    monkeypatch.setattr(scenes, "PIECES", 80)
    monkeypatch.setattr(scenes, "GROUNDS", 60)
    material = getattr(scenes._material, "__wrapped__", scenes._material)
    for validation, absent in ((False, 2), (True, 0)):
        pieces, grounds = material(validation)
        for images in (*pieces.values(), grounds):
            assert images[..., 2 - absent].any(axis=(1, 2)).all()
            assert not images[..., absent].any()


def test_they_are_written_to_the_cache_once(monkeypatch, tmp_path):
    written = []

    def write(place):
        written.append(place)
        (place / "annotations").mkdir(parents=True)
        (place / "annotations" / "instances_val2017.json").touch()

    monkeypatch.setattr(scenes, "write_scenes", write)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "sslzoo" / f"scenes-{scenes.VERSION}"
    assert scenes.folder() == scenes.folder() == expected
    assert scenes.folder(tmp_path / "mine") == tmp_path / "mine"
    assert written == [expected, tmp_path / "mine"]


def test_a_build_that_breaks_leaves_nothing(monkeypatch, tmp_path):
    def broken(partial, split, count):
        (partial / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "_write_split", broken)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_scenes(tmp_path / "place")
    assert list(tmp_path.iterdir()) == []


def test_who_comes_second_keeps_what_the_first_has_written(monkeypatch, tmp_path):
    place = tmp_path / "place"

    def write(partial, split, count):
        for top in (partial, place):
            (top / "annotations").mkdir(parents=True, exist_ok=True)
            (top / "annotations" / "instances_val2017.json").write_text("first" if top == place else "second")

    monkeypatch.setattr(scenes, "_write_split", write)
    scenes.write_scenes(place)
    assert (place / "annotations" / "instances_val2017.json").read_text() == "first"
    assert os.listdir(tmp_path) == ["place"]


def test_a_root_that_holds_something_else_is_not_touched(tmp_path):
    (tmp_path / "letter.txt").touch()
    with pytest.raises(UserError, match="holds no scenes, and is not empty"):
        scenes.folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="scenes cannot be written to"):
        scenes.folder(tmp_path / "file" / "below")


def test_pretraining_sees_the_training_scenes(place):
    train, val = load("scenes", place)
    assert len(train) == 60
    assert val is None
    assert train.read(0).shape[2] == 3
