"""Batches for detectors: that they repeat, belong to seed, epoch and image, and get past damaged pictures."""

import numpy as np
import pytest
import torch
from torch import nn

from boxed import data, loader, rectangles, same, write_coco
from runs import trainer
from sslzoo.data.box_module import AUGMENTS, BoxLoader, box_example
from sslzoo.data.box_views import mirrored
from sslzoo.data.boxes import load_boxes
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.optim import Optim


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in COCO's layout: 12 training and 6 held-out pictures."""
    root = tmp_path_factory.mktemp("coco")
    return write_coco(root, rectangles(root, "train", 12, 0), rectangles(root, "val", 6, 1))


@pytest.fixture(scope="module")
def sets(root):
    return load_boxes("coco", root)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_are_a_function_of_seed_epoch_and_image_alone(sets, augment):
    batches = list(loader(sets, augment=augment, workers=3))
    assert len(batches) == 3
    assert same(batches, loader(sets, augment=augment, workers=1))
    assert not same(batches, loader(sets, augment=augment, seed=6))
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(12))
    for batch in batches:
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert image.dtype == torch.uint8
            assert image.shape == (3, 48, 48) or augment == "flip"
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()


def test_a_loader_goes_on_where_it_stood_and_epochs_differ(sets):
    whole = loader(sets)
    first, second = list(whole), list(whole)
    assert whole.position == 6
    assert not same(first, second)
    late = loader(sets)
    late.position = 4
    assert same(second[1:], late)


def test_two_ranks_see_what_one_sees(sets):
    parts = [list(loader(sets, rank=rank, world=2)) for rank in (0, 1)]
    for batch, *halves in zip(loader(sets), *parts, strict=True):
        assert torch.equal(torch.cat([half.index for half in halves]), batch.index)
        images = [image for half in halves for image in half.images]
        assert all(torch.equal(a, b) for a, b in zip(images, batch.images, strict=True))


def test_a_batch_half_taken_leaves_nothing_behind(sets):
    taken = iter(loader(sets))
    next(taken)
    taken.close()


def test_targets_have_what_is_wanted(root):
    sets = load_boxes("coco", root, masks=True)
    for augment in ("s1", "flip"):
        for batch in loader(sets, augment=augment, wanted=("boxes", "masks", "area")):
            for image, target in zip(batch.images, batch.targets, strict=True):
                assert target.keys() == {"boxes", "masks", "area"}
                assert target["masks"].shape[1:] == image.shape[1:]


# The mirror


def pointed(absent: bool = True) -> dict:
    """A target of two objects, the second a crowd, with points named left, middle and right of the first."""
    points = torch.tensor([[2.0, 1, 2], [5, 2, 1], [7, 3, 2]])
    if absent:
        points[1] = 0
    masks = torch.zeros(2, 4, 10, dtype=torch.uint8)
    masks[0, 1:3, 2:5] = 1
    return {
        "boxes": torch.tensor([[2.0, 1, 5, 3], [0, 0, 10, 4]]),
        "labels": torch.tensor([2, 1]),
        "iscrowd": torch.tensor([False, True]),
        "masks": masks,
        "keypoints": torch.stack([points, torch.zeros(3, 3)]),
        "image_id": 7,
    }


SWAP = [2, 1, 0]  # left, middle, right


def test_a_mirror_takes_boxes_masks_and_points_along_and_leaves_crowds_out():
    image = np.arange(4 * 10 * 3, dtype=np.uint8).reshape(4, 10, 3)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    target = pointed()
    seen = set()
    for draw in range(20):
        found_pixels, found = mirrored(image, target, draw, SWAP)
        assert found["labels"].tolist() == [2]
        x1, y1, x2, y2 = found["boxes"][0].int().tolist()
        assert found["masks"][0].sum() == found["masks"][0, y1:y2, x1:x2].sum() == 6
        seen.add((x1, x2))
        assert torch.equal(found_pixels, pixels if x1 == 2 else pixels.flip(-1))
    assert seen == {(2, 5), (5, 8)}
    assert target["boxes"][0].tolist() == [2, 1, 5, 3]
    assert target["keypoints"][0, 0].tolist() == [2, 1, 2]


def test_a_mirrored_point_lies_on_its_pixel_under_the_name_of_the_other_side():
    image = np.zeros((4, 10, 3), np.uint8)
    target = pointed(absent=False)
    for k, (x, y, _) in enumerate(target["keypoints"][0].int().tolist()):
        image[y, x] = 10 * (k + 1)  # the pixel that each point is on: 10 left, 20 middle, 30 right
    sides = set()
    for draw in range(20):
        pixels, found = mirrored(image, target, draw, SWAP)
        values = [int(pixels[0, int(y), int(x)]) for x, y, _ in found["keypoints"][0].tolist()]
        flipped = found["boxes"][0, 0] == 5
        assert values == ([30, 20, 10] if flipped else [10, 20, 30])
        assert found["keypoints"][0, 0, 0] < found["keypoints"][0, 2, 0]  # left is left of right, as it was
        assert found["keypoints"][0, :, 2].tolist() == [2, 1, 2]
        sides.add(bool(flipped))
    assert sides == {False, True}


def test_an_absent_point_stays_absent_in_a_mirror():
    for draw in range(10):
        _, found = mirrored(np.zeros((4, 10, 3), np.uint8), pointed(), draw, SWAP)
        assert found["keypoints"][0, 1].tolist() == [0, 0, 0]


# Damage and mistakes


def damaged(tmp_path, *rows: int):
    """A set of 12 pictures of which some are cut short after they were listed."""
    root = write_coco(tmp_path, rectangles(tmp_path, "train", 12, 0), rectangles(tmp_path, "val", 6, 1))
    sets = load_boxes("coco", root)
    for row in rows:
        sets[0].files[row].write_bytes(sets[0].files[row].read_bytes()[:100])
    return sets


def test_a_damaged_picture_stops_the_run_with_its_name(tmp_path):
    sets = damaged(tmp_path, 7)
    with pytest.raises(UserError, match=r"1049\.png cannot be decoded .* data\.on_error=skip") as caught:
        list(loader(sets))
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_is_replaced_by_the_next_one_and_named(tmp_path):
    sets = damaged(tmp_path, 7, 8)
    skipping = loader(sets, on_error="skip", workers=3)
    batches = list(skipping)
    index = torch.cat([batch.index for batch in batches]).tolist()
    assert sorted(index) == [0, 1, 2, 3, 4, 5, 6, 9, 9, 9, 10, 11]
    assert skipping.skipped == {7, 8}
    assert same(batches, loader(sets, on_error="skip", workers=1))
    whole = box_example(sets[0], "s1", 48, 5)
    (image, target), place = whole(9, 0), index.index(9)
    batch = batches[place // 4]
    assert torch.equal(batch.images[place % 4], image)
    assert torch.equal(batch.targets[place % 4]["boxes"], target["boxes"])


class Bright(Method):
    """A loss of any kind, for a run however short."""

    def __init__(self):
        super().__init__(nn.Linear(1, 1), Optim(lr=1e-4, lr_per=None))

    def loss(self, batch):
        return self.encoder(torch.stack(batch.images).float().mean().view(1)).sum()


def test_what_was_skipped_is_told_by_its_file(tmp_path):
    sets = damaged(tmp_path, 3)
    boxes = data(sets, size=64, batch_size=12, on_error="skip")
    assert boxes.skipped == []
    trainer(max_epochs=1).fit(Bright(), datamodule=boxes)
    assert boxes.skipped == [sets[0].files[3]]


def test_nothing_readable_is_one_line_and_not_for_ever(tmp_path):
    sets = damaged(tmp_path, *range(12))
    with pytest.raises(UserError, match="no image of coco can be read"):
        list(loader(sets, on_error="skip"))


def test_data_that_cannot_train_are_refused(sets):
    train, val = sets
    with pytest.raises(UserError, match=r"task\.augment=s5 is none of s1, s2, s3, s4, .*flip"):
        data(sets, augment="s5")
    with pytest.raises(UserError, match=r"data\.batch_size=13 is more than the 12 training images"):
        data(sets, batch_size=13)
    with pytest.raises(UserError, match="have no boxes"):
        data((train.unlabelled(), val))
    with pytest.raises(UserError, match="data=coco has no keypoints"):
        data(sets, wanted=("boxes", "keypoints"))
    with pytest.raises(UserError, match="does not split evenly over 3"):
        loader(sets, world=3)


def test_any_function_makes_examples(sets):
    def example(row: int, epoch: int):
        return torch.full((3, 2, 2), row, dtype=torch.uint8), {"epoch": torch.tensor(epoch)}

    for epoch in (0, 1):
        made = BoxLoader(sets[0], example, 4)
        made.position = 3 * epoch
        for batch in made:
            assert [int(image[0, 0, 0]) for image in batch.images] == batch.index.tolist()
            assert all(target["epoch"] == epoch for target in batch.targets)
