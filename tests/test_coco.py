"""COCO's files: labels, masks and keypoints as pycocotools reads them; every fault is one line, or is skipped."""

import json
import time

import numpy as np
import pytest
import torch
from pycocotools import mask as reference

from boxed import content, rectangle, runs, write_coco
from sslzoo.data.boxes import load_boxes, load_unlabelled
from sslzoo.data.coco import packed_pixels, read_coco
from sslzoo.errors import UserError


def read(root, **options):
    return read_coco(root / "annotations" / "instances_train2017.json", root / "train2017", **options)


def refused(root, *parts, **options):
    """Reading raises one line with each of ``parts`` and says how to go on."""
    with pytest.raises(UserError) as error:
        read(root, **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_labels_are_ranks_of_category_ids_from_1_and_images_keep_their_order(tmp_path):
    found = read(write_coco(tmp_path))
    assert found.category_ids == [1, 3, 90]
    assert found.classes == ["person", "car", "brush"]
    assert found.image_ids == [139, 7, 285]
    assert [found.target(i)["labels"].tolist() for i in range(3)] == [[2, 1, 3], [], [3]]
    image, target = found.read(0)
    assert image.shape == (30, 40, 3)
    assert target["boxes"].tolist() == [[2, 3, 12, 8], [20.5, 1, 30.5, 13], [4, 4, 8, 8]]
    assert target["area"].tolist() == [50, 60, 16]
    assert target["iscrowd"].tolist() == [False, True, False]
    assert target["image_id"] == 139
    assert {key: value.dtype for key, value in target.items() if key != "image_id"} == {
        "boxes": torch.float32, "labels": torch.int64, "area": torch.float32, "iscrowd": torch.bool,
        "difficult": torch.bool,
    }  # fmt: skip


def test_an_empty_image_has_targets_of_no_rows(tmp_path):
    target = read(write_coco(tmp_path), masks=True).target(1, with_masks=True)
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 24, 24)


def test_polygons_and_both_kinds_of_run_lengths_become_the_masks_of_pycocotools(tmp_path):
    found = read(write_coco(tmp_path), masks=True)
    masks = found.target(0, with_masks=True)["masks"]
    assert masks.dtype == torch.uint8
    expected = [rectangle(30, 40, 2, 3, 12, 8), rectangle(30, 40, 21, 1, 30, 13), rectangle(30, 40, 4, 4, 8, 8)]
    np.testing.assert_array_equal(masks.numpy(), np.stack(expected))
    np.testing.assert_array_equal(found.target(2, True)["masks"].numpy()[0], rectangle(20, 25, 5, 6, 12, 16))
    slanted = content()
    slanted["annotations"][1]["segmentation"] = [[2.3, 3.7, 30.2, 9.9, 17.5, 26.1, 5.5, 20.25]]
    own = read(write_coco(tmp_path, slanted), masks=True).target(0, True)["masks"].numpy()[0]
    theirs = reference.decode(reference.frPyObjects(slanted["annotations"][1]["segmentation"], 30, 40))[..., 0]
    np.testing.assert_array_equal(own, theirs)


def test_a_class_map_has_small_objects_on_top_and_ignores_crowds(tmp_path):
    painted = read(write_coco(tmp_path), masks=True).class_map(0).numpy()
    assert painted[3, 2] == 2
    assert painted[5, 5] == 3
    assert painted[5, 25] == 255
    assert painted[29, 39] == 0


def test_compressed_run_lengths_cover_what_pycocotools_says():
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 400, 2)) < rng.random() ** 3 for _ in range(40)]
    masks += [np.zeros((300, 500), bool), np.ones((700, 900), bool)]
    packed = [reference.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode() for mask in masks]
    assert packed_pixels(packed).tolist() == [mask.size for mask in masks]
    assert packed_pixels([*packed[:2], "", packed[2]]).tolist() == [*(m.size for m in masks[:2]), -1, masks[2].size]
    cut = [text[:-1] for text in packed if len(text) > 4]
    assert (packed_pixels(cut) != [mask.size for mask, text in zip(masks, packed, strict=True) if len(text) > 4]).all()


def test_masks_that_were_not_read_say_how_to_read_them(tmp_path):
    with pytest.raises(UserError, match="masks=True"):
        read(write_coco(tmp_path)).target(0, with_masks=True)


def test_keypoints_are_padded_with_absent_ones_and_swap_by_name(tmp_path):
    entry = content()
    entry["categories"][1]["keypoints"] = ["nose", "left_ear", "right_ear"]
    entry["annotations"][2]["keypoints"] = [21, 2, 2, 22, 3, 1, 0, 0, 0]
    found = read(write_coco(tmp_path, entry))
    points = found.target(0, with_keypoints=True)["keypoints"]
    assert points.shape == (3, 3, 3)
    assert points[1].tolist() == [[21, 2, 2], [22, 3, 1], [0, 0, 0]]
    assert not points[0].any()
    assert found.swap == [0, 2, 1]
    with pytest.raises(UserError, match="has no keypoints"):
        read(write_coco(tmp_path, content())).target(0, with_keypoints=True)


def with_change(change):
    entry = content()
    change(entry)
    return entry


FAULTS = {  # name: (change, parts of the message, what is skipped, images left, objects left)
    "no width": (lambda c: c["annotations"][1].update(bbox=[2, 3, 0, 5]),
                 ["annotation 2", "[2, 3, 2, 8]", "no area"], "box without an area", 3, 3),
    "negative height": (lambda c: c["annotations"][1].update(bbox=[2, 3, 4, -5]),
                        ["annotation 2", "no area"], "box without an area", 3, 3),
    "not finite": (lambda c: c["annotations"][1].update(bbox=[2, 3, float("nan"), 5]),
                   ["annotation 2"], "box without an area", 3, 3),
    "outside": (lambda c: c["annotations"][1].update(bbox=[2, 3, 40, 5]),
                ["annotation 2", "[2, 3, 42, 8]", "40 x 30"], "box outside its image", 3, 3),
    "missing image": (lambda c: c["annotations"][1].update(image_id=5),
                      ["annotation 2", "image 5"], "annotation of no image", 3, 3),
    "unknown category": (lambda c: c["annotations"][1].update(category_id=12),
                         ["annotation 2", "category_id 12"], "unknown category", 3, 3),
    "image id twice": (lambda c: c["images"].append({**c["images"][1], "file_name": "d.png"}),
                       ["image 7", "twice", "id"], "image listed twice", 3, 4),
    "file twice": (lambda c: c["images"].append({**c["images"][1], "id": 8}),
                   ["image 8", "a.png", "twice"], "image listed twice", 3, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_file_and_id_or_is_skipped_and_counted(tmp_path, name):
    change, parts, reason, images, objects = FAULTS[name]
    root = write_coco(tmp_path, with_change(change))
    refused(root, "instances_train2017.json", "data.on_error=skip", *parts)
    found = read(root, on_error="skip")
    assert found.skipped == {reason: 1}
    assert (len(found), len(found.labels)) == (images, objects)
    assert found.image_ids == [139, 7, 285]


def test_a_box_may_leave_its_image_by_the_pixel_that_rounding_takes(tmp_path):
    root = write_coco(tmp_path, with_change(lambda c: c["annotations"][1].update(bbox=[-0.5, 3, 41, 5])))
    assert read(root).xywh[0].tolist() == [-0.5, 3, 41, 5]


def test_a_picture_that_is_not_there_is_named(tmp_path):
    root = write_coco(tmp_path)
    (root / "train2017" / "b.png").unlink()
    refused(root, "image 139", "b.png", "train2017")
    found = read(root, on_error="skip")
    assert found.skipped == {"missing picture": 1}
    assert found.image_ids == [7, 285]
    assert found.target(1)["labels"].tolist() == [3]


MASKS = {
    "another size": (lambda a: a[0]["segmentation"].update(size=[25, 20]), "annotation 1", "of 20 x 25 pixels"),
    "cut short": (lambda a: a[0]["segmentation"].update(counts=a[0]["segmentation"]["counts"][:3]), "annotation 1",
                  "pixels in all"),
    "within a number": (lambda a: a[0]["segmentation"].update(counts="0o"), "annotation 1", "cut short"),
    "list cut short": (lambda a: a[2]["segmentation"]["counts"].pop(), "annotation 3", "run lengths of"),
    "negative": (lambda a: a[2]["segmentation"]["counts"].__setitem__(0, -1), "annotation 3", "no counts"),
    "a line": (lambda a: a[1].update(segmentation=[[1, 2, 3, 4]]), "annotation 2", "polygon"),
    "odd": (lambda a: a[1].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 2", "polygon"),
    "text": (lambda a: a[1].update(segmentation=[["1", 2, 3, 4, 5, 6]]), "annotation 2", "polygon"),
    "none": (lambda a: a[1].pop("segmentation"), "annotation 2", "missing"),
    "a number": (lambda a: a[1].update(segmentation=5), "annotation 2", "neither"),
    "empty": (lambda a: a[1].update(segmentation=[]), "annotation 2", "neither"),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_a_faulty_mask_is_named_when_masks_are_read(tmp_path, name):
    change, *parts = MASKS[name]
    root = write_coco(tmp_path, with_change(lambda c: change(c["annotations"])))
    refused(root, "its mask", *parts, masks=True)
    found = read(root, masks=True, on_error="skip")
    assert found.skipped == {"mask": 1}
    assert len(found.segmentations) == len(found.labels) == 3
    assert read(root).skipped == {}


def test_keypoints_of_a_wrong_length_are_named(tmp_path):
    entry = content()
    entry["categories"][1]["keypoints"] = ["nose", "left_ear", "right_ear"]
    entry["annotations"][2]["keypoints"] = [21, 2, 2]
    root = write_coco(tmp_path, entry)
    refused(root, "annotation 3", "3 times x, y, visibility")
    assert read(root, on_error="skip").skipped == {"keypoints": 1}
    entry["categories"][0]["keypoints"] = ["wheel"]
    refused(write_coco(tmp_path, entry), "different keypoints")


BROKEN = {
    "not JSON": ('{"images": [', ["is not JSON"]),
    "not text": ("\udcff", ["is not JSON"]),
    "a list": ("[]", ["holds a list"]),
    "not COCO": ('{"pictures": []}', ["not COCO's", "'images'", "pictures"]),
    "no annotations": ('{"images": [], "categories": []}', ["'annotations'"]),
    "no images": ('{"images": [], "annotations": [], "categories": []}', ["lists no images"]),
    "no height": ('{"images": [{"id": 1, "file_name": "a.png", "width": 3}], "annotations": [], "categories": []}',
                  ["image 1", "'height'"]),
    "height of text": ('{"images": [{"id": 1, "file_name": "a.png", "height": null, "width": 3}], "annotations": [],'
                       ' "categories": []}', ["image 1", "height=None", "a number"]),
    "box of three": ('{"images": [{"id": 1, "file_name": "a.png", "height": 3, "width": 3}], "categories": [],'
                     ' "annotations": [{"id": 4, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}]}',
                     ["annotation 4", "[1, 2, 3]", "4 numbers"]),
    "category twice": ('{"images": [{"id": 1, "file_name": "a.png", "height": 3, "width": 3}], "annotations": [],'
                       ' "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', ["two categories of id 1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_cocos_is_refused_even_under_skip(tmp_path, name):
    text, parts = BROKEN[name]
    root = write_coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(root, str(file), *parts, on_error="skip")


def test_missing_files_and_folders_are_named_with_the_layout(tmp_path):
    root = write_coco(tmp_path)
    (root / "annotations" / "instances_train2017.json").rename(tmp_path / "away")
    refused(root, "instances_train2017.json is no file", "expected annotations/")
    (tmp_path / "away").rename(root / "annotations" / "instances_train2017.json")
    (root / "train2017").rename(root / "pictures")
    refused(root, "train2017 is no folder", "expected annotations/", on_error="skip")
    with pytest.raises(UserError, match="is no folder"):
        load_boxes("coco", tmp_path / "nowhere")


def test_a_set_whose_every_image_is_skipped_is_refused(tmp_path):
    root = write_coco(tmp_path)
    for file in (root / "train2017").iterdir():
        file.unlink()
    refused(root, "none of its 3 images", on_error="skip")


def test_validation_has_the_labels_of_training_and_no_other_classes(tmp_path):
    fewer = content()
    del fewer["categories"][1], fewer["annotations"][2]
    _, val = load_boxes("coco", write_coco(tmp_path, val=fewer))
    assert val.classes == ["person", "car", "brush"]
    assert val.labels.tolist() == [2, 3, 3]
    other = content()
    other["categories"][1]["name"] = "robot"
    with pytest.raises(UserError, match="category 1 is robot, but in the training set person"):
        load_boxes("coco", write_coco(tmp_path, val=other))


def test_unlabelled_images_are_the_rest_of_training_and_unlabeled2017(tmp_path):
    root = write_coco(tmp_path)
    (root / "unlabeled2017").mkdir()
    (root / "train2017" / "a.png").rename(root / "unlabeled2017" / "u.png")
    (root / "annotations" / "image_info_unlabeled2017.json").write_text(
        json.dumps({"images": [{"id": 99, "file_name": "u.png", "height": 24, "width": 24}]})
    )
    options = {"label_fraction": 0.5, "on_error": "skip"}
    train, _ = load_boxes("coco", root, **options)
    found = load_unlabelled("coco", root, **options)
    assert sorted(train.image_ids + found.image_ids) == [99, 139, 285]
    assert found.read(len(found) - 1)[0].shape == (24, 24, 3)
    assert found.target(0)["boxes"].shape == (0, 4)
    assert found.category_ids == train.category_ids


def test_a_large_file_is_read_fast(tmp_path):
    """1/20 of COCO's training set; its 118,287 images and 860,001 annotations shall take less than 100 s of CPU."""
    rng = np.random.default_rng(0)
    images, objects = 5914, 43000
    (tmp_path / "train2017").mkdir()
    for k in range(images):
        (tmp_path / "train2017" / f"{k}.jpg").touch()
    outline = rng.uniform(0, 400, 60).round(2).tolist()
    entry = {
        "images": [{"id": 3 * k, "file_name": f"{k}.jpg", "height": 480, "width": 640} for k in range(images)],
        "annotations": [
            {"id": k, "image_id": 3 * int(i), "category_id": 1, "bbox": [1.5, 2.5, 30.25, 40.0], "area": 500.5,
             "iscrowd": 0, "segmentation": [outline]}
            for k, i in enumerate(rng.integers(0, images, objects))
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    file = tmp_path / "large.json"
    file.write_text(json.dumps(entry))
    start = time.process_time()
    found = read_coco(file, tmp_path / "train2017", masks=True)
    seconds = time.process_time() - start
    assert len(found) == images
    assert len(found.labels) == objects
    assert seconds < 100 / 20, seconds


def test_run_lengths_of_the_helpers_are_pycocotools_own():
    mask = rectangle(9, 8, 1, 2, 6, 9)
    np.testing.assert_array_equal(reference.decode(reference.frPyObjects(runs(mask), 9, 8)), mask)
