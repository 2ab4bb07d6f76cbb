"""Sets with class maps by name, and what a segmenter is given of them in training."""

import numpy as np
import pytest
import torch
from PIL import Image

from boxed import content, flat, rectangles, same, write_coco, write_voc
from sslzoo.data.box_module import BoxLoader
from sslzoo.data.box_views import STRENGTHS
from sslzoo.data.boxes import load_boxes
from sslzoo.data.map_module import map_example
from sslzoo.data.maps import load_maps
from sslzoo.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    return write_coco(root, rectangles(root, "train", 12, 0), rectangles(root, "val", 6, 1))


@pytest.fixture(scope="module")
def train(root):
    return load_boxes("coco", root, masks=True)[0]


def settings(name, root, **more):
    return {"name": name, "root": root, "on_error": "raise", "label_fraction": 1.0, "batch_size": 4, **more}


# Sets


def test_background_is_class_0_and_masks_are_read(root):
    train, val = load_maps(settings("coco", root))
    assert train.map_classes == ["background", "red", "blue"]
    found = val.class_map(0)
    assert found.shape == tuple(val.sizes[0])
    assert set(found.unique().tolist()) == {0, 1, 2}


def test_pascals_images_are_those_with_maps(tmp_path):
    objects = {name: [("cat", 0, 3, 4, 20, 22)] for name in ("a", "b", "c")}
    drawn = {"a": {"cat": 8}, "c": {"cat": 8}}
    write_voc(tmp_path, "2012", {"train": ["a", "b"], "val": ["c"]}, objects, segmentation=drawn)
    train, val = load_maps(settings("voc", tmp_path, years="2012"))
    assert (train.image_ids, val.image_ids) == (["a"], ["c"])
    assert len(train.map_classes) == 21
    assert set(train.class_map(0).unique().tolist()) == {0, 8, 255}


def test_more_labels_of_pascal_are_those_of_sbd(tmp_path):
    objects = {name: [("cat", 0, 3, 4, 20, 22)] for name in ("a", "b", "c")}
    drawn = {"a": {"cat": 8}, "c": {"cat": 8}}
    top = write_voc(tmp_path, "2012", {"train": ["a", "b"], "val": ["c"]}, objects, segmentation=drawn)
    top = top / "VOCdevkit" / "VOC2012"
    (top / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("a\nb\n")
    (top / "SegmentationClassAug").mkdir()
    for name in "ab":
        Image.fromarray(np.full((30, 40), 9, np.uint8)).save(top / "SegmentationClassAug" / f"{name}.png")
    train, val = load_maps(settings("voc", tmp_path, years="2012aug"))
    assert (train.image_ids, val.image_ids) == (["a", "b"], ["c"])
    assert [train.class_map(i).unique().tolist() for i in (0, 1)] == [[9], [9]]
    assert set(val.class_map(0).unique().tolist()) == {0, 8, 255}


def test_sets_without_masks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data=cifar10 has no masks; choose one of data=coco, data=voc, data=scenes, "):
        load_maps(settings("cifar10", None))
    boxes = content()
    del boxes["annotations"][1]["segmentation"]
    with pytest.raises(UserError, match="annotation 2: its mask") as error:
        load_maps(settings("coco", write_coco(tmp_path, train=boxes)))
    assert "\n" not in str(error.value)


# Squares


def loader(train, augment="s1", size=48, seed=5, **options) -> BoxLoader:
    return BoxLoader(train, map_example(train, augment, size, seed), 4, seed, **options)


@pytest.mark.parametrize("augment", STRENGTHS)
def test_squares_are_a_function_of_seed_epoch_and_image_alone(train, augment):
    batches = list(loader(train, augment, workers=3))
    assert len(batches) == 3
    assert same(batches, loader(train, augment, workers=1))
    assert not same(batches, loader(train, augment, seed=6))
    for batch in batches:
        assert all(image.shape == (3, 48, 48) and image.dtype == torch.uint8 for image in batch.images)
        maps = [target["class_map"] for target in batch.targets]
        assert all(each.shape == (48, 48) and each.dtype == torch.uint8 for each in maps)
        assert {value for each in maps for value in each.unique().tolist()} <= {0, 1, 2, 255}


def test_a_loader_goes_on_where_it_stood_and_two_ranks_see_what_one_sees(train):
    whole = loader(train)
    first, second = list(whole), list(whole)
    assert not same(first, second)
    late = loader(train)
    late.load_state_dict({"position": 4})
    assert same(second[1:], late)
    halves = [list(loader(train, rank=rank, world=2)) for rank in (0, 1)]
    for batch, one, other in zip(first, *halves, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.images, one.images + other.images, strict=True))
        assert torch.equal(torch.stack([t["class_map"] for t in batch.targets]),
                           torch.stack([t["class_map"] for t in one.targets + other.targets]))  # fmt: skip
    assert len(flat(first[0])) == 4 + 1 + 4


def agreement(pairs) -> float:
    """Pixels that are red or blue and called so, over those that are or are called so, of images and class maps."""
    right = total = 0
    for pixels, found in pairs:
        red, blue = pixels[0].int(), pixels[2].int()
        for k, colour in ((1, red - blue > 60), (2, blue - red > 60)):
            right += int((colour & (found == k)).sum())
            total += int((colour | (found == k)).sum())
    return right / total


@pytest.mark.parametrize(("augment", "lost"), [("s1", 0.04), ("s3", 0.3), ("s4", 0.3), ("own_scale", 0.04)])
def test_classes_lie_on_their_colours_but_for_edges_and_changed_colours(train, augment, lost):
    example = map_example(train, augment, 56)
    views = [example(row, epoch) for epoch in range(4) for row in range(12)]
    before = agreement((torch.tensor(train.picture(i)).permute(2, 0, 1), train.class_map(i)) for i in range(12))
    assert before > 0.9  # where the two cover each other the smaller is above in the map, the blue one in the picture
    assert agreement((pixels, target["class_map"]) for pixels, target in views) > before - lost


@pytest.mark.parametrize(
    ("augment", "size", "message"),
    [
        ("s9", 48, "task.augment=s9 is none of s1, s2, s3, s4, own_scale"),
        ("flip", 48, "task.augment=flip is none of s1"),
        ("s1", 16, "task.size=16 is not from 32 to 4096"),
        ("s1", 5000, "task.size=5000 is not from 32 to 4096"),
        ("own_scale", 129, "task.size=129 is not from 32 to 1.., the squares that task.augment=own_scale cuts out of"),
    ],
)
def test_squares_that_cannot_be_are_refused(train, augment, size, message):
    with pytest.raises(UserError, match=message):
        map_example(train, augment, size)


def test_an_unknown_class_is_named_with_its_file(tmp_path):
    objects = {name: [("cat", 0, 3, 4, 20, 22)] for name in ("a", "c")}
    write_voc(tmp_path, "2012", {"train": ["a"], "val": ["c"]}, objects, segmentation={n: {"cat": 30} for n in "ac"})
    train, _ = load_maps(settings("voc", tmp_path, years="2012"))
    with pytest.raises(UserError, match=r"SegmentationClass/a.png has class 30, but data=voc has 20 classes"):
        map_example(train, "s1", 48)(0, 0)
