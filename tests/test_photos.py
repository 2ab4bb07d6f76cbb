"""The built-in photograph patches: an honest split, stable, balanced, and neither flat nor trivially easy."""

import numpy as np
import pytest

from sslzoo.data import photos
from sslzoo.data.images import load


@pytest.fixture(scope="module")
def sources():
    return photos.read_photos()


def painted(photo):
    """Red noise on training pixels, blue noise on held-out ones: a leak shows as the wrong colour."""
    held = photos.held_out(*photo.shape[:2])
    noise = np.random.default_rng(0).integers(1, 256, photo.shape[:2], dtype=np.uint8)
    paint = np.zeros_like(photo)
    paint[..., 0] = np.where(held, 0, noise)
    paint[..., 2] = np.where(held, noise, 0)
    return paint


def test_no_source_pixel_is_in_both_splits(sources):
    train = photos.cut(sources, 2000, validation=False)
    val = photos.cut(sources, 500, validation=True)
    for label, photo in enumerate(sources):
        seen = {}
        for split, patches in (("train", train), ("val", val)):
            seen[split] = np.zeros(photo.shape[:2], bool)
            for left, top, right, bottom in patches.boxes[patches.labels == label]:
                seen[split][top:bottom, left:right] = True
        assert seen["train"].any()
        assert seen["val"].any()
        assert not (seen["train"] & seen["val"]).any()


def test_the_resize_filter_reads_nothing_outside_a_patch(sources, monkeypatch):
    monkeypatch.setattr(photos, "FLAT", 0)  # blue noise is dark
    paint = [painted(photo) for photo in sources[:3]]
    train = photos.cut(paint, 300, validation=False).images
    val = photos.cut(paint, 300, validation=True).images
    assert train[..., 0].any(axis=(1, 2)).all()
    assert not train[..., 2].any()
    assert val[..., 2].any(axis=(1, 2)).all()
    assert not val[..., 0].any()


def test_every_held_out_cell_has_no_held_out_neighbour():
    cells = photos.held_out(9 * photos.CELL, 9 * photos.CELL)[:: photos.CELL, :: photos.CELL]
    for r, c in np.argwhere(cells):
        assert cells[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].sum() == 1
    assert abs(cells.mean() - 1 / 5) < 0.02


@pytest.fixture
def plain(monkeypatch):
    """Patches as the photographs show them: no exposure, no cast."""
    monkeypatch.setattr(photos, "EXPOSURE", 0.0)
    monkeypatch.setattr(photos, "CAST", 0.0)


def test_a_patch_is_the_antialiased_reduction_of_its_box(sources, plain):
    patches = photos.cut(sources, 200, validation=False, size=12)
    for image, label, (left, top, right, bottom) in zip(*patches, strict=True):
        source = sources[label][top:bottom, left:right].mean((0, 1))
        assert np.abs(image.mean((0, 1)) - source).max() < 4  # gray levels; plain subsampling is off by 20
        assert right - left == bottom - top


def test_exposure_and_cast_scale_each_channel_within_their_range(sources, plain, monkeypatch):
    before = photos.cut(sources, 10, validation=False).images.astype(float)
    monkeypatch.undo()
    after = photos.cut(sources, 10, validation=False).images
    for plain_patch, patch in zip(before, after, strict=True):
        for channel in range(3):
            kept = (patch[..., channel] < 255) & (plain_patch[..., channel] > 40)  # neither clipped nor coarse
            if kept.sum() > 50:
                gains = patch[..., channel][kept] / plain_patch[..., channel][kept]
                assert np.ptp(gains) < 0.05
                assert abs(np.log(gains).mean()) < photos.EXPOSURE + photos.CAST + 0.02


def test_scales_spread_over_the_whole_range(sources):
    boxes = photos.cut(sources, 1000, validation=False).boxes
    side = boxes[:, 2] - boxes[:, 0]
    low, high = photos.SIDES
    assert side.min() >= low
    assert side.max() < high
    assert np.quantile(side, 0.25) < low + 0.35 * (high - low)
    assert np.quantile(side, 0.75) > low + 0.55 * (high - low)


def test_classes_are_balanced_and_named(sources):
    train, val = load("photos", train_size=205, val_size=103)
    for split in (train, val):
        counts = np.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 1
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split), 32, 32, 3)
        assert split.classes == list(photos.PHOTOS)
    assert len(sources) == len(set(train.classes)) == 10


def test_no_patch_is_flat(sources):
    for validation in (False, True):
        patches = photos.cut(sources, 300, validation)
        for label, (left, top, right, bottom) in zip(patches.labels, patches.boxes, strict=True):
            gray = sources[label][top:bottom, left:right] @ np.array([0.299, 0.587, 0.114])
            assert gray.std() > photos.FLAT - 1e-6


def test_patches_do_not_depend_on_global_random_state_or_on_count(sources):
    np.random.seed(1)  # noqa: NPY002
    few = photos.cut(sources, 50, validation=False)
    np.random.seed(2)  # noqa: NPY002
    many = photos.cut(sources, 100, validation=False)
    np.testing.assert_array_equal(few.images, many.images[:50])
    other = photos.cut(sources, 50, validation=False, seed=1)
    assert (few.boxes != other.boxes).any(axis=1).all()


def test_size_is_the_side_of_the_patches(sources):
    assert photos.cut(sources, 10, validation=True, size=20).images.shape == (10, 20, 20, 3)


def test_raw_pixels_beat_chance_but_leave_something_to_learn():
    train, val = load("photos")
    mean, std = (stat(train.images, axis=(0, 1, 2)) for stat in (np.mean, np.std))
    x, y = (((s.images - mean) / std).astype(np.float32).reshape(len(s), -1) for s in (train, val))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    nearest = np.argpartition(-(y[:500] @ x.T), 20, axis=1)[:, :20]
    votes = np.stack([np.bincount(row, minlength=10) for row in train.labels[nearest]])
    accuracy = (votes.argmax(1) == val.labels[:500]).mean()
    assert 0.25 < accuracy < 0.65
