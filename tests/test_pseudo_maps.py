"""A teacher's class maps as files: what is read back, what is refused, how good they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from boxed import rectangles, write_coco
from sslzoo.data.boxes import load_boxes, load_unlabelled
from sslzoo.data.map_module import map_example
from sslzoo.data.maps import held_back_maps, load_maps, load_unlabelled_maps
from sslzoo.data.pseudo_maps import PseudoMaps
from sslzoo.downstream.segmentation import pixel_cross_entropy
from sslzoo.errors import UserError
from sslzoo.report.class_maps import write_map
from sslzoo.tasks.selftrain_maps import class_shares, quality
from test_cityscapes import write_cityscapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    return write_coco(root, rectangles(root, "train", 10, 0), rectangles(root, "val", 3, 1))


@pytest.fixture
def unlabelled(root):
    return load_unlabelled("coco", root, label_fraction=0.4)


@pytest.fixture
def maps(tmp_path, unlabelled) -> PseudoMaps:
    """Of all images but the first: class 1 on the left, 2 on the right, unsure in between."""
    for name, (height, width) in zip(unlabelled.image_ids[1:], unlabelled.sizes.tolist()[1:], strict=True):
        drawn = torch.full((height, width), 255, dtype=torch.uint8)
        drawn[:, :10], drawn[:, -10:] = 1, 2
        write_map(tmp_path / f"{name}.png", drawn)
    return PseudoMaps.read(tmp_path, unlabelled)


def test_what_was_drawn_is_read_back_for_the_images_that_have_a_map(maps, unlabelled):
    assert maps.image_ids == unlabelled.image_ids[1:]
    assert len(maps) == len(maps.files) == len(maps.sizes) == 5
    assert maps.map_classes == ["background", "red", "blue"]
    for i in range(len(maps)):
        found = maps.class_map(i)
        assert found.shape == maps.picture(i).shape[:2] == tuple(maps.sizes[i])
        assert found[:, :10].eq(1).all()
        assert found[:, -10:].eq(2).all()
        assert found[:, 10:-10].eq(255).all()


def test_pixels_that_the_teacher_is_unsure_of_carry_no_gradient(maps):
    pixels, target = map_example(maps, "s1", 48, seed=1)(0, 0)
    truth = target["class_map"][None]
    scores = torch.randn(1, 3, *pixels.shape[1:], dtype=torch.double, requires_grad=True)
    pixel_cross_entropy(scores, truth).backward()
    unsure = truth == 255
    assert unsure.any()
    assert not unsure.all()
    assert scores.grad.abs().sum(1)[unsure].eq(0).all()
    assert scores.grad.abs().sum(1)[~unsure].gt(0).all()


def test_quality_counts_pixels_as_a_slow_loop_does(maps, root):
    truth = load_boxes("coco", root, masks=True)[0]
    right = labelled = pixels = 0
    inter, union = np.zeros(3), np.zeros(3)
    for i, name in enumerate(maps.image_ids):
        true, said = truth.class_map(truth.image_ids.index(name)).numpy(), maps.class_map(i).numpy()
        right += ((said == true) & (said != 255)).sum()
        labelled += (said != 255).sum()
        pixels += true.size
        for k in range(3):
            inter[k] += ((said == k) & (true == k)).sum()
            union[k] += ((said == k) | (true == k)).sum()
    found = quality(maps, [truth])
    assert found["right"] == pytest.approx(right / labelled)
    assert found["recall"] == pytest.approx(right / pixels)
    assert found["miou"] == pytest.approx((inter / union).mean())
    assert found["judged_images"] == 5
    assert quality(maps, []) == {}


def test_shares_of_classes_are_those_of_all_pixels(root):
    truth = load_boxes("coco", root, masks=True)[0]
    pixels = np.concatenate([truth.class_map(k).numpy().ravel() for k in range(len(truth))])
    assert class_shares(truth) == pytest.approx(
        {name: (pixels == k).mean() for k, name in enumerate(truth.map_classes)}
    )


@pytest.mark.parametrize("kind", ["coco", "cityscapes"])
def test_labelled_and_unlabelled_images_share_none_and_labels_held_back_are_true(tmp_path, root, kind):
    place = root if kind == "coco" else write_cityscapes(tmp_path / "cityscapes", train=6)
    settings = {"name": kind, "root": place, "label_fraction": 0.5, "on_error": "raise"}
    train, _ = load_maps(settings)
    images, (truth,) = load_unlabelled_maps(settings), held_back_maps(settings)
    whole, _ = load_maps(settings | {"label_fraction": 1.0})
    assert not set(train.image_ids) & set(images.image_ids)
    assert {*train.image_ids, *images.image_ids} == set(whole.image_ids)
    assert truth.image_ids == images.image_ids
    for k, name in enumerate(truth.image_ids):
        assert torch.equal(truth.class_map(k), whole.class_map(whole.image_ids.index(name)))


def test_files_of_other_images_or_classes_are_refused_in_one_line(tmp_path, maps, unlabelled):
    for content, message in (
        (np.full((5, 5), 1, np.uint8), "is no class map of"),
        (np.full(tuple(maps.sizes[0]), 7, np.uint8), "has class 7, but data=coco has 3 classes; label again"),
    ):
        Image.fromarray(content).save(maps.maps[0])
        with pytest.raises(UserError, match=message):
            maps.class_map(0)
    maps.maps[0].write_bytes(b"no picture")
    with pytest.raises(UserError, match="is no picture, or cut short; label again"):
        maps.class_map(0)
    with pytest.raises(UserError, match="are no folder; task=selftrain writes them to RUN/pseudo/maps"):
        PseudoMaps.read(tmp_path / "none", unlabelled)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no class map of an unlabelled image of data=coco"):
        PseudoMaps.read(tmp_path / "empty", unlabelled)
