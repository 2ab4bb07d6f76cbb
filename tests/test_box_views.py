"""Augmentation: pixels, boxes, masks and keypoints move together, and every draw is a function of the key."""

import numpy as np
import pytest
import torch

from boxed import picture
from sslzoo.data.box_policies import AUTO, GRAY, RAND, moved
from sslzoo.data.box_scene import MEAN, cropped, flipped, resized, scene_of
from sslzoo.data.box_views import STRENGTHS, augmented
from sslzoo.errors import UserError
from sslzoo.views.draw import key

SWAP = [1, 0, 2]


def example(height=70, width=90):
    """Two rectangles of unlike colours on gray, with masks and three keypoints each; and a crowd."""
    boxes = torch.tensor([[20, 15, 45, 35], [50, 30, 80, 60], [0, 0, 90, 70.0]])
    image = np.full((height, width, 3), 90, np.uint8)
    masks = torch.zeros((3, height, width), dtype=torch.uint8)
    for k, (colour, (x1, y1, x2, y2)) in enumerate(zip(((250, 0, 0), (0, 0, 250)), boxes.int().tolist(), strict=False)):
        image[y1:y2, x1:x2] = colour
        masks[k, y1:y2, x1:x2] = 1
    x1, y1, x2, y2 = boxes[:2].unbind(1)
    points = torch.zeros(3, 3, 3)
    points[:2, 0] = torch.stack([x1, y1, x1 * 0 + 2], 1)  # the pixels in the corners: top left, top right, bottom right
    points[:2, 1] = torch.stack([x2 - 1, y1, x1 * 0 + 2], 1)
    points[:2, 2] = torch.stack([x2 - 1, y2 - 1, x1 * 0 + 1], 1)
    sides = boxes[:, 2:] - boxes[:, :2]
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 2]), "area": sides.prod(1), "masks": masks,
              "keypoints": points, "iscrowd": torch.tensor([False, False, True]), "image_id": 7}  # fmt: skip
    return image, target


def scene(**without):
    image, target = example()
    return scene_of(image, {k: v for k, v in target.items() if k not in without})


def hull(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


def together(found, tolerance=1.5):
    """Masks lie on their colours, boxes around masks, keypoints in masks."""
    pixels = found.pixels.int()
    colours = (pixels[0] - pixels[2] > 150, pixels[2] - pixels[0] > 150)
    for k, row in enumerate(found.rows.tolist()):
        mask = found.masks[k].bool()
        assert (mask ^ colours[row]).float().mean() < 0.02
        np.testing.assert_allclose(found.boxes[k], hull(mask.numpy()), atol=tolerance)
        height, width = mask.shape
        for x, y, seen in found.points[k].tolist():
            if seen and 0 <= x < width and 0 <= y < height:
                near = mask[max(int(y) - 2, 0) : int(y) + 3, max(int(x) - 2, 0) : int(x) + 3]
                assert near.any()
                assert not near.all() or min(x, y, width - x, height - y) < 3


@pytest.mark.parametrize(
    "change",
    [
        lambda s: flipped(s, SWAP),
        lambda s: resized(s, 1.7),
        lambda s: resized(s, 0.6),
        lambda s: moved(s, translate=(9.0, -6.0)),
        lambda s: cropped(s, 50, np.random.default_rng(0)),
        lambda s: cropped(s, 200, np.random.default_rng(0)),
    ],
    ids=["flip", "larger", "smaller", "moved", "crop", "pad"],
)
def test_pixels_boxes_masks_and_keypoints_move_together(change):
    found = change(scene())
    assert len(found.rows) == 2
    together(found)


@pytest.mark.parametrize(("angle", "shear"), [(20.0, (0.0, 0.0)), (-20.0, (0.0, 0.0)), (0.0, (15.0, 0.0)),
                                              (0.0, (0.0, -15.0))])  # fmt: skip
def test_a_turned_or_slanted_box_becomes_the_hull(angle, shear):
    together(moved(scene(), angle=angle, shear=shear), tolerance=2.5)


def test_a_mirror_swaps_left_and_right_keypoints_and_twice_is_nothing():
    before = scene()
    once = flipped(before, SWAP)
    assert once.boxes[0].tolist() == [45, 15, 70, 35]
    assert once.points[0, 0].tolist() == [90 - 44.5, 15.5, 2]  # the top right pixel is the top left one now
    twice = flipped(once, SWAP)
    assert torch.equal(twice.points, before.points)
    assert torch.equal(twice.boxes, before.boxes)
    assert torch.equal(twice.pixels, before.pixels)
    assert torch.equal(twice.masks, before.masks)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_view_has_the_size_whole_boxes_and_rows_that_agree(strength):
    image, target = example()
    sizes = set()
    for index in range(40):
        view, found = augmented(image, target, strength, 64, key(0, 0, index), SWAP)
        assert view.shape == (3, 64, 64)
        assert view.dtype == torch.uint8
        n = len(found["boxes"])
        sizes.add(n)
        assert all(len(found[name]) == n for name in ("labels", "area", "masks", "keypoints", "iscrowd"))
        assert found["image_id"] == 7
        assert not found["iscrowd"].any()
        x1, y1, x2, y2 = found["boxes"].unbind(1)
        assert ((x2 - x1 >= 1) & (y2 - y1 >= 1) & (x1 >= 0) & (y1 >= 0) & (x2 <= 64) & (y2 <= 64)).all()
        assert found["masks"].flatten(1).any(1).all()
        points = found["keypoints"]
        assert (points[..., :2] >= -0.5).all()
        assert (points[..., :2] < 64).all()
        assert set(points[..., 2].unique().tolist()) <= {0, 1, 2}
    assert 2 in sizes


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_view_is_a_function_of_its_key(strength):
    image = picture(70, 90)
    _, target = example()
    first = [augmented(image, target, strength, 48, key(0, 1, k), SWAP) for k in range(6)]
    torch.rand(3)
    again = [augmented(image, target, strength, 48, key(0, 1, k), SWAP) for k in reversed(range(6))][::-1]
    for (one, left), (other, right) in zip(first, again, strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(left[name], right[name]) for name in left if name != "image_id")
    assert not all(torch.equal(first[0][0], other[0]) for other in first[1:])


def test_scales_are_those_of_the_paper():
    assert {name: strength.scale for name, strength in STRENGTHS.items()} == {
        "s1": (0.8, 1.2), "s2": (0.8, 1.2), "s3": (0.5, 2.0), "s4": (0.5, 2.0), "own_scale": (0.5, 2.0)}  # fmt: skip
    image, target = example(90, 90)
    del target["masks"], target["keypoints"]
    for strength, (low, high) in (("s1", (0.8, 1.2)), ("s4", (0.5, 2.0))):
        target["boxes"] = torch.tensor([[0.0, 0, 90, 90]])
        one = {"boxes": target["boxes"], "labels": torch.ones(1), "area": torch.tensor([8100.0])}
        sides = [augmented(image, one, "s1" if strength == "s1" else strength, 90, key(2, k))[1]["boxes"][0, 2]
                 for k in range(60)]  # fmt: skip
        assert min(sides) < 90 * (low + 0.1)
        assert max(sides) == 90
        assert min(sides) >= 90 * low - 16 * (strength == "s4")
        assert high > 1


def test_an_image_without_objects_and_objects_that_leave_it_are_targets_of_no_rows():
    image, target = example()
    none = {key: value[:0] if isinstance(value, torch.Tensor) else value for key, value in target.items()}
    for strength in STRENGTHS:
        for index in range(8):
            _, found = augmented(image, none, strength, 32, key(index), SWAP)
            assert found["boxes"].shape == (0, 4)
            assert found["masks"].shape == (0, 32, 32)
            assert found["labels"].shape == (0,)
    gone = moved(scene(), translate=(80.0, 0.0))
    assert gone.rows.tolist() == []


def test_areas_follow_scale_and_crop():
    image, target = example()
    plain = {key: target[key] for key in ("boxes", "labels", "area", "iscrowd")}
    for index in range(10):
        masked = augmented(image, target, "s1", 80, key(index), SWAP)[1]
        boxed = augmented(image, plain, "s1", 80, key(index))[1]
        if len(masked["area"]) == len(boxed["area"]):
            np.testing.assert_allclose(boxed["area"], masked["area"], rtol=0.12)


@pytest.mark.parametrize("name", AUTO)
def test_every_operation_of_autoaugment_changes_the_image_and_keeps_it_valid(name):
    image, target = example()
    image = picture(70, 90)
    plain = {key: target[key] for key in ("boxes", "labels", "area", "iscrowd")}
    changed = 0
    for k in range(6):
        before = scene_of(image, plain)
        after = AUTO[name](before, 0.6, np.random.default_rng(k))
        assert after.pixels.shape == before.pixels.shape
        assert after.pixels.dtype == torch.uint8
        changed += not torch.equal(after.pixels, before.pixels)
    assert changed >= 3


def test_every_operation_of_randaugment_keeps_the_image_valid():
    image = picture(70, 90)
    _, target = example()
    plain = {key: target[key] for key in ("boxes", "labels", "area", "iscrowd")}
    changed = []
    for operation in RAND:
        before = scene_of(image, plain)
        after = operation(before, 0.5, np.random.default_rng(0))
        assert after.pixels.shape == before.pixels.shape
        changed.append(not torch.equal(after.pixels, before.pixels))
    assert sum(changed) >= len(RAND) - 2  # the identity, and autocontrast of noise that fills the range


def test_content_moves_within_boxes_only_and_never_under_masks():
    image, target = example()
    image = picture(70, 90)
    plain = {key: target[key][:2] for key in ("boxes", "labels", "area", "iscrowd")}
    outside = np.ones((70, 90), bool)
    for x1, y1, x2, y2 in plain["boxes"].int().tolist():
        outside[y1:y2, x1:x2] = False
    after = AUTO["translate_y_in_boxes"](scene_of(image, plain), 0.6, np.random.default_rng(1))
    np.testing.assert_array_equal(after.pixels.numpy()[:, outside], image.transpose(2, 0, 1)[:, outside])
    before = scene()
    assert AUTO["translate_y_in_boxes"](before, 0.6, np.random.default_rng(1)) is before


def test_wrong_calls_are_refused():
    image, target = example()
    with pytest.raises(UserError, match="augment=s5 is none of s1, s2, s3, s4"):
        augmented(image, target, "s5")
    with pytest.raises(ValueError, match="swap"):
        augmented(image, target, "s1")


def painted():
    """The example with a class map in place of masks and keypoints: 1 on red, 2 on blue, and a strip of 255."""
    image, target = example()
    classes = torch.zeros(70, 90, dtype=torch.uint8)
    for k in (0, 1):
        classes[target["masks"][k].bool()] = k + 1
    classes[:3] = 255
    return image, {"boxes": torch.zeros(0, 4), "class_map": classes}


@pytest.mark.parametrize(
    ("change", "uncovers"),
    [
        (lambda s: flipped(s), False),
        (lambda s: resized(s, 1.7), False),
        (lambda s: resized(s, 0.6), False),
        (lambda s: moved(s, translate=(9.0, -6.0)), True),
        (lambda s: moved(s, angle=25.0), True),
        (lambda s: cropped(s, 50, np.random.default_rng(0)), False),
        (lambda s: cropped(s, 200, np.random.default_rng(0)), True),
    ],
    ids=["flip", "larger", "smaller", "moved", "turned", "crop", "pad"],
)
def test_classes_stay_on_their_pixels_and_what_is_uncovered_is_ignored(change, uncovers):
    image, target = painted()
    target["class_map"][:3] = 0
    found = change(scene_of(image, target))
    assert found.classes.shape == found.pixels.shape[1:]
    assert found.classes.dtype == torch.uint8
    pixels = found.pixels.int()
    for k, colour in ((1, pixels[0] - pixels[2] > 80), (2, pixels[2] - pixels[0] > 80)):
        assert ((found.classes == k) ^ colour).float().mean() < 0.01
    assert (found.classes == 255).any() == uncovers
    gray = torch.tensor([GRAY] * 3 if found.size == (70, 90) else MEAN)[:, None].int()
    if uncovers:
        outside = pixels[:, found.classes == 255]
        assert ((outside - gray).abs() <= 1).all(0).float().mean() > 0.9  # pixels at the border are blends


def test_a_class_map_keeps_its_values_and_operations_that_tear_boxes_leave_it():
    image, target = painted()
    for strength in STRENGTHS:
        for index in range(10):
            view, found = augmented(image, target, strength, 64, key(0, 0, index))
            assert view.shape[1:] == found["class_map"].shape == (64, 64)
            assert set(found["class_map"].unique().tolist()) <= {0, 1, 2, 255}
    before = scene_of(image, {**target, "boxes": torch.tensor([[20.0, 15, 45, 35]])})
    assert AUTO["translate_y_in_boxes"](before, 0.6, np.random.default_rng(1)) is before


def test_shrunk_classes_are_those_at_the_middle_of_the_new_pixels():
    image, target = painted()
    found = resized(scene_of(image, target), 1 / 3)
    rows, columns = ((np.arange(n) + 0.5) * side / n for n, side in zip(found.size, (70, 90), strict=True))
    wanted = target["class_map"].numpy()[np.ix_(rows.astype(int), columns.astype(int))]
    np.testing.assert_array_equal(found.classes.numpy(), wanted)


def test_own_scale_is_relative_to_the_image_and_not_to_the_crop():
    image, target = np.full((40, 40, 3), 250, np.uint8), {"boxes": torch.zeros(0, 4)}
    target["class_map"] = torch.ones(40, 40, dtype=torch.uint8)
    sides = []
    for index in range(60):
        _, found = augmented(image, target, "own_scale", 100, key(3, index))
        sides.append(float((found["class_map"] == 1).sum()) ** 0.5)
    assert 20 <= min(sides) < 26
    assert 74 < max(sides) <= 80
