"""PASCAL VOC's files: pixels counted from 0, difficult flags, class and object maps; every fault is one line."""

import numpy as np
import pytest

from boxed import write_voc
from sslzoo.data.boxes import load_boxes, training_pictures
from sslzoo.errors import UserError

OBJECTS = {
    "000005": [("dog", 0, 1, 1, 10, 20), ("cat", 1, 5, 6, 40, 30)],
    "000007": [("person", 0, 3, 3, 4, 4)],
    "2012_000001": [("cat", 0, 2, 2, 9, 9)],
}
LABELS = {"cat": 8, "dog": 12, "person": 15}  # PASCAL's own numbers


@pytest.fixture
def root(tmp_path):
    drawn = {"000005": LABELS}
    write_voc(tmp_path, 2007, {"trainval": ["000005", "000007"], "test": ["000009"]}, OBJECTS, segmentation=drawn)
    return write_voc(tmp_path, 2012, {"train": ["2012_000001"], "val": ["2012_000003"],
                                      "trainval": ["2012_000001", "2012_000003"]}, OBJECTS)  # fmt: skip


def refused(root, *parts, **options):
    with pytest.raises(UserError) as error:
        load_boxes("voc", root, **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def annotation(root, name, year=2007):
    return root / "VOCdevkit" / f"VOC{year}" / "Annotations" / f"{name}.xml"


def test_boxes_start_at_0_and_keep_pascals_labels_and_difficult_flags(root):
    train, val = load_boxes("voc", root, years="2007")
    image, target = train.read(0)
    assert image.shape == (30, 40, 3)
    assert target["boxes"].tolist() == [[0, 0, 10, 20], [4, 5, 40, 30]]
    assert target["labels"].tolist() == [12, 8]
    assert target["difficult"].tolist() == [False, True]
    assert target["area"].tolist() == [200, 900]
    assert target["image_id"] == "000005"
    assert not train.crowd.any()
    assert len(val.target(0)["boxes"]) == 0


@pytest.mark.parametrize(
    ("years", "train", "val"),
    [
        (2007, ["000005", "000007"], ["000009"]),
        ("2012", ["2012_000001"], ["2012_000003"]),
        ("07+12", ["000005", "000007", "2012_000001", "2012_000003"], ["000009"]),
    ],
)
def test_years_choose_the_lists_and_either_folder_may_be_the_root(root, years, train, val):
    for place in (root, root / "VOCdevkit"):
        sets = load_boxes("voc", place, years=years)
        assert [one.image_ids for one in sets] == [train, val]
    assert [file.stem for file in training_pictures("voc", root, years)] == train


def test_class_and_object_maps_are_read(root):
    train, _ = load_boxes("voc", root, years="2007")
    painted = train.class_map(0).numpy()
    assert painted[0, 0] == 255
    assert painted[1, 1] == 12
    assert painted[29, 39] == 8
    masks = train.target(0, with_masks=True)["masks"].numpy()
    assert masks.shape == (2, 30, 40)
    assert masks[1].sum() == 36 * 25
    assert masks[0].sum() == 10 * 20 - 6 * 15  # the second object was drawn over it
    assert len(train.run_lengths(0)) == 2
    with pytest.raises(UserError, match="image 000007 of data=voc has no masks"):
        train.target(1, with_masks=True)


def test_segmentation_takes_the_images_with_maps_only(root):
    write_voc(root, 2007, {"test": ["000009"]}, {"000009": [("dog", 0, 1, 1, 5, 5)]}, segmentation={"000009": LABELS})
    train, val = load_boxes("voc", root, years="2007", segmentation=True)
    assert (train.image_ids, val.image_ids) == (["000005"], ["000009"])
    one, _ = load_boxes("voc", root, years="2007", segmentation=True, class_agnostic=True)
    assert np.unique(one.class_map(0)).tolist() == [0, 1, 255]


def test_other_classes_come_from_the_option_or_from_classes_txt(root):
    train, val = load_boxes("voc", root, years="2007", classes=["dog", "person", "cat"])
    assert train.classes == val.classes == ["dog", "person", "cat"]
    assert train.labels.tolist() == [1, 3, 2]
    (root / "VOCdevkit" / "VOC2007" / "classes.txt").write_text("background\ncat\ndog\nperson\n")
    assert load_boxes("voc", root, years="2007")[0].labels.tolist() == [2, 1, 3]


FAULTS = {
    "no area": (("dog", 0, 5, 5, 3, 9), "object 1 (dog)", "no area", "box without an area"),
    "outside": (("dog", 0, 5, 5, 60, 9), "object 1 (dog)", "40 x 30", "box outside its image"),
    "class": (("unicorn", 0, 5, 5, 9, 9), "object 1 (unicorn)", "data.classes", "unknown class"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_object_is_one_line_or_is_skipped(root, name):
    entry, *parts, reason = FAULTS[name]
    write_voc(root, 2007, {"trainval": ["000005", "000007"]}, {**OBJECTS, "000007": [entry]})
    refused(root, "000007.xml", "data.on_error=skip", *parts, years="2007")
    train, _ = load_boxes("voc", root, years="2007", on_error="skip")
    assert train.skipped == {reason: 1}
    assert len(train.target(1)["boxes"]) == 0


def test_broken_annotations_lists_and_folders_are_named(root):
    file = annotation(root, "000007")
    whole = file.read_text()
    for text, says in ((whole[:40], "is not XML"), (whole.replace("<xmin>3</xmin>", ""), "is not PASCAL's"),
                       (whole.replace("<width>40", "<width>wide"), "is not PASCAL's")):  # fmt: skip
        file.write_text(text)
        refused(root, "000007.xml", says, years="2007")
    file.unlink()
    refused(root, "000007.xml is no file", years="2007")
    file.write_text(whole)
    refused(root, "data.years=2010 is none of 2007, 2012, 2012aug, 07+12", years=2010)
    lists = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "trainval.txt"
    lists.write_text("000005\n000005\n")
    refused(root, "lists image 000005 twice", years="2007")
    assert load_boxes("voc", root, years="2007", on_error="skip")[0].skipped == {"image listed twice": 1}
    lists.write_text("000005\n000011\n")
    refused(root, "has no picture 000011", years="2007")
    lists.write_text("\n")
    refused(root, "trainval.txt lists no images", years="2007")
    lists.unlink()
    refused(root, "trainval.txt is no file", years="2007")
    refused(root / "VOCdevkit" / "VOC2007", "has no VOC2007 or VOC2012", years="2007")


def test_a_map_with_more_classes_than_named_is_refused(root):
    train, _ = load_boxes("voc", root, years="2007", classes=["dog", "person", "cat"])
    with pytest.raises(UserError, match=r"000005\.png has class 12, but data=voc has 3 classes"):
        train.class_map(0)
