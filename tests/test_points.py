"""Objects with points: crops, where their points come to lie, mirrors by name, faces from a CSV, units of distance."""

import json

import numpy as np
import pytest
import torch

from boxed import rectangles, write_coco
from pointed import CORNERS, FACE_NAMES, faces, write_corners, write_faces
from sslzoo.data.boxes import load_boxes
from sslzoo.data.faces import load_faces, read_faces
from sslzoo.data.point_sets import load_points, load_with_points
from sslzoo.data.points import clean_view, eye_distances, in_picture, objects, point_example, squares_around
from sslzoo.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corners(tmp_path_factory.mktemp("coco"))


def settings(root, **more) -> dict:
    return {"name": "coco", "root": root, "on_error": "raise", "label_fraction": 1.0, "held_out": 0.2, **more}


@pytest.fixture(scope="module")
def train(root):
    return load_points(settings(root))[0]


def marked(train, k: int, value: int = 255):
    """The set with black pictures in which the k-th point of every object is a white pixel, if it is labelled."""

    def picture(i):
        canvas = np.zeros((*train.sizes[i].tolist(), 3), np.uint8)
        x, y, labelled = train.points[i, k]
        if labelled:
            canvas[int(np.floor(y + 0.5)), int(np.floor(x + 0.5))] = value
        return canvas

    return train.__class__(**{**vars(train), "picture": picture})


# Objects of a set with boxes


def test_every_object_with_a_point_is_one_example_of_its_own_picture(root, train):
    images, _ = load_boxes("coco", root)
    assert len(train) == len(images.labels)
    assert train.names == list(CORNERS)
    assert train.swap == [1, 0, 2]
    image = np.repeat(np.arange(len(images)), np.diff(images.starts))
    for i in (0, 3, len(train) - 1):
        assert np.array_equal(train.picture(i), images.picture(int(image[i])))
        assert train.boxes[i].tolist() == [*images.xywh[i, :2], *(images.xywh[i, :2] + images.xywh[i, 2:])]


def test_objects_without_a_labelled_point_and_crowds_are_left_out(tmp_path, train):
    file = write_corners(tmp_path) / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["keypoints"] = [0.0] * 9
    content["annotations"][1]["iscrowd"] = 1
    del content["annotations"][2]["keypoints"]
    file.write_text(json.dumps(content))
    left = objects(load_boxes("coco", tmp_path)[0])
    assert len(left) == len(train) - 3
    assert np.array_equal(left.points, train.points[3:])


def test_squares_are_1_25_times_the_longer_side_about_the_middle():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(2, 40, (40, 2))], axis=1)
    for (left, top, side), (x1, y1, x2, y2) in zip(squares_around(boxes, 1.25).tolist(), boxes.tolist(), strict=True):
        longer = 1.25 * max(x2 - x1, y2 - y1)
        assert longer <= side < longer + 1
        assert abs(left + side / 2 - (x1 + x2) / 2) <= 0.5
        assert abs(top + side / 2 - (y1 + y2) / 2) <= 0.5


def test_a_subset_keeps_every_column_together(train):
    part = train.subset([5, 2])
    for k, i in enumerate((5, 2)):
        assert np.array_equal(part.points[k], train.points[i])
        assert part.files[k] == train.files[i]
        assert np.array_equal(part.picture(k), train.picture(i))
        assert torch.equal(clean_view(part, k, 24), clean_view(train, i, 24))
    assert np.array_equal(part.subset([1]).picture(0), train.picture(2))


# Views


@pytest.mark.parametrize("k", range(3))
def test_in_every_view_the_point_is_on_its_pixel(train, k):
    options = {"flip": True, "scale": 0.2, "shift": 0.1, "rotate": 25}
    white, black = (point_example(marked(train, k, value), 72, **options) for value in (255, 0))
    looked = 0
    for row in range(len(train)):
        for epoch in range(4):
            (pixels, target), (without, _) = white(row, epoch), black(row, epoch)
            points = target["points"]
            weight = (pixels.double() - without.double()).abs().sum(0)
            if not (points[:, 2] > 0).all() or not weight.any():  # a pixel at the very border may be gone
                continue
            grid = torch.arange(72.0).double()
            middle = torch.stack([weight.sum(0) @ grid, weight.sum(1) @ grid]) / weight.sum()
            near = [float((points[j, :2] - middle).norm()) for j in {k, train.swap[k]}]
            assert min(near) < 72 / float(train.squares[row, 2])  # a pixel of the picture; half of one is rounding
            looked += 1
    assert looked > 30


def test_left_and_right_swap_in_a_mirror_on_pixels_and_names(train):
    dots = marked(train, 0)  # left_top
    plain = point_example(dots, 48, flip=False)
    example = point_example(dots, 48, flip=True)
    seen = {True: 0, False: 0}
    for row in np.flatnonzero((train.points[..., 2] > 0).all(1)).tolist():
        pixels, target = plain(row, 0)
        for epoch in range(6):
            view, found = example(row, epoch)
            mirrored = not torch.equal(view, pixels)
            seen[mirrored] += 1
            if not mirrored:
                assert torch.equal(found["points"], target["points"])
                continue
            assert torch.equal(view, pixels.flip(-1))
            x, y, labelled = target["points"].unbind(-1)
            for name, other in (("left_top", "right_top"), ("right_top", "left_top"), ("middle", "middle")):
                now, then = CORNERS.index(name), CORNERS.index(other)
                wanted = torch.stack([47 - x[then], y[then], labelled[then]])
                torch.testing.assert_close(found["points"][now], wanted, atol=1e-4, rtol=0)
            assert found["points"][0, 0] < found["points"][1, 0]  # the left one is still on the left
    assert min(seen.values()) > 10


def test_missing_points_are_zero_whatever_happens_to_the_view(train):
    example = point_example(train, 24, flip=True, scale=0.3, shift=0.1, rotate=40)
    rows = np.flatnonzero((train.points[..., 2] == 0).any(1)).tolist()
    assert rows
    for row in rows:
        for epoch in range(4):
            points = example(row, epoch)[1]["points"]
            assert (points[points[:, 2] == 0] == 0).all()
            assert (points[:, 2] == 0).sum() >= (train.points[row, :, 2] == 0).sum()


def test_points_outside_the_view_are_not_learned(train):
    example = point_example(train, 24, flip=False, shift=1.0)
    outside = 0
    for row in range(len(train)):
        points = example(row, 0)[1]["points"]
        kept = points[points[:, 2] > 0]
        assert ((kept[:, :2] >= -0.5) & (kept[:, :2] < 23.5)).all()
        outside += int((train.points[row, :, 2] > 0).sum() - len(kept))
    assert outside > 5


def test_views_are_a_function_of_seed_epoch_and_row(train):
    for example in (point_example(train, 24, seed, scale=0.2, rotate=10) for seed in (0, 1)):
        once, again, later = example(3, 0), example(3, 0), example(3, 1)
        assert torch.equal(once[0], again[0])
        assert torch.equal(once[1]["points"], again[1]["points"])
        assert not torch.equal(once[0], later[0])
        assert once[0].shape == (3, 24, 24)
        assert once[0].dtype == torch.uint8
    a, b = (point_example(train, 24, seed, scale=0.2)(3, 0)[0] for seed in (0, 1))
    assert not torch.equal(a, b)


def test_places_in_a_view_go_back_to_where_they_were_in_the_picture(train):
    example = point_example(train, 40, flip=False)
    rows = np.arange(len(train))
    places = torch.stack([example(row, 0)[1]["points"] for row in rows.tolist()])
    back = in_picture(train, rows, places[..., :2], 40)
    seen = places[..., 2] > 0
    assert seen.sum() == (train.points[..., 2] > 0).sum()
    torch.testing.assert_close(back[seen], torch.from_numpy(train.points[..., :2])[seen], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 4}, "task.size=4 is not from 8"),
        ({"scale": 1.5}, "task.scale=1.5 is not from 0 to 0.9"),
        ({"shift": -1}, "task.shift=-1 is not from 0 to 1"),
        ({"rotate": 200}, "task.rotate=200 is not from 0 to 180"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(train, wrong, message):
    with pytest.raises(UserError, match=message):
        point_example(train, **{"size": 24, **wrong})


# Sets


def test_sets_without_keypoints_are_refused(tmp_path, root):
    plain = write_coco(tmp_path, rectangles(tmp_path, "train", 4, 0), rectangles(tmp_path, "val", 4, 1))
    for load in (load_points, load_with_points):
        with pytest.raises(UserError, match="data=coco has no keypoints; choose data that has some"):
            load(settings(plain))
        with pytest.raises(UserError, match="data=photos has no keypoints; choose one of data=scenes, data=coco"):
            load({"name": "photos"})
    with pytest.raises(UserError, match="data=faces has no boxes"):
        load_with_points({"name": "faces"})


def test_a_set_whose_points_are_all_missing_is_refused(tmp_path, root):
    write_corners(tmp_path, 4, 4)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["keypoints"] = [0.0] * 9
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="all keypoints of the held-out images of data=coco are missing"):
        load_points(settings(tmp_path))


def test_keypoint_rcnn_gets_the_classes_with_points_as_one_and_images_that_teach(tmp_path):
    write_corners(tmp_path, 8, 4)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        if annotation["category_id"] == 90:
            annotation["keypoints"] = [0.0] * 9  # blue rectangles have none
        elif annotation["image_id"] == 1000:
            annotation["keypoints"] = [0.0] * 9
    file.write_text(json.dumps(content))
    train, val = load_with_points(settings(tmp_path))
    assert train.classes == val.classes == ["red"]
    assert train.category_ids == [3]
    assert set(train.labels) == set(val.labels) == {1}
    assert train.image_ids == [1000 + 7 * i for i in (1, 2, 4, 5, 6)]  # 3 and 7 are empty, 0 has no point
    assert len(val) == 4
    assert np.diff(val.starts).tolist() == [1, 1, 1, 0]


# Units


def test_distances_are_in_units_of_box_picture_or_eyes(train):
    sides = train.boxes[:, 2:] - train.boxes[:, :2]
    for i, unit in enumerate(train.normalisers("box")):
        assert unit == pytest.approx(float(sides[i, 0] * sides[i, 1]) ** 0.5)
    for i, unit in enumerate(train.normalisers("image")):
        height, width = train.picture(i).shape[:2]
        assert unit == pytest.approx((height * width) ** 0.5)
    with pytest.raises(UserError, match=r"task\.normalise=head is none of box, interocular, image"):
        train.normalisers("head")
    with pytest.raises(UserError, match="needs eyes, but the points of data=coco are left_top, right_top, middle"):
        train.normalisers("interocular")


def test_eyes_are_found_by_cocos_and_the_csvs_names():
    points = np.array([[[0.0, 0, 1], [9, 9, 1], [3, 4, 2]], [[1, 1, 0], [9, 9, 1], [3, 4, 2]], [[3, 4, 1]] * 3])
    for names in (["left_eye", "nose", "right_eye"], ["right_eye_center", "nose", "left_eye_center"]):
        assert eye_distances(points, names, "faces") == pytest.approx([5, np.nan, np.nan], nan_ok=True)


# Faces


def test_faces_are_read_with_their_missing_points_and_those_without_any_left_out(tmp_path):
    lines = faces(12)
    found = read_faces(write_faces(tmp_path, lines) / "training.csv")
    assert len(found) == 11
    assert found.skipped == {"without a point": 1}
    assert found.names == list(FACE_NAMES)
    assert found.swap == [1, 0, 2, 4, 3]
    kept = [line for i, line in enumerate(lines) if i != 4]
    for i, line in enumerate(kept):
        picture = found.picture(i)
        assert picture.shape == (96, 96, 3)
        assert (
            picture[..., 0].ravel().tolist() == picture[..., 2].ravel().tolist() == [*map(int, line["Image"].split())]
        )
        for k, name in enumerate(FACE_NAMES):
            if line[f"{name}_x"] == "":
                assert found.points[i, k].tolist() == [0, 0, 0]
            else:
                wanted = [float(line[f"{name}_x"]) - 0.5, float(line[f"{name}_y"]) - 0.5, 1]
                assert found.points[i, k].tolist() == pytest.approx(wanted, abs=1e-4)


def test_a_part_of_the_faces_is_held_out_the_same_for_every_seed(tmp_path):
    root = write_faces(tmp_path, faces(21))
    train, val = load_faces(root, seed=0)
    assert (len(train), len(val)) == (16, 4)
    again, same = load_faces(root, seed=5, label_fraction=0.5)
    assert np.array_equal(same.points, val.points)
    assert len(again) == 8
    every = {image.picture(i).tobytes() for image in (train, val) for i in range(len(image))}
    assert len(every) == 20
    assert {again.picture(i).tobytes() for i in range(8)} < {train.picture(i).tobytes() for i in range(16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[2].update(Image="1 2 3"), r"training\.csv, line 4: its Image has 3 values, not 9216"),
        (lambda lines: lines[0].update(Image=None), r"training\.csv, line 2: its Image has 0 values, not 9216"),
        (
            lambda lines: lines[1].update(Image=lines[1]["Image"].replace(" ", " x", 1)),
            r"training\.csv, line 3: its Image has values that are no numbers",
        ),
        (
            lambda lines: lines[1].update(Image="300 " + lines[1]["Image"].partition(" ")[2]),
            r"training\.csv, line 3: its Image has values that are not from 0 to 255",
        ),
        (lambda lines: lines[3].update(nose_tip_x="left", nose_tip_y="1"), r"line 5: nose_tip is at 'left', '1'"),
        (lambda lines: [line.pop("Image") for line in lines], r"training\.csv needs columns NAME_x, NAME_y and Image"),
        (
            lambda lines: [line.pop(key) for line in lines for key in list(line) if key.endswith("_y")],
            r"training\.csv needs columns NAME_x, NAME_y and Image",
        ),
        (
            lambda lines: [line.update(dict.fromkeys((k for k in line if k != "Image"), "")) for line in lines],
            r"training\.csv has no face with a point: all of 8 are missing",
        ),
    ],
)
def test_a_faulty_csv_is_one_line_with_file_and_line(tmp_path, change, message):
    lines = faces(8)
    change(lines)
    write_faces(tmp_path, lines)
    with pytest.raises(UserError, match=message) as caught:
        load_faces(tmp_path)
    assert "\n" not in str(caught.value)


def test_faulty_lines_are_skipped_and_counted_where_asked(tmp_path):
    lines = faces(8)
    lines[2]["Image"] = "1 2 3"
    write_faces(tmp_path, lines)
    found = read_faces(tmp_path / "training.csv", "skip")
    assert len(found) == 6
    assert found.skipped == {"line": 1, "without a point": 1}


def test_faces_need_a_folder_with_the_csv(tmp_path):
    with pytest.raises(UserError, match=r"data\.root is null, but data=faces needs the folder of training\.csv"):
        load_faces(None)
    with pytest.raises(UserError, match=r"training\.csv is no file"):
        load_faces(tmp_path)
    write_faces(tmp_path, faces(8))
    for part in (0.0, 1.0, 0.01):
        with pytest.raises(UserError, match=f"data.held_out={part}"):
            load_faces(tmp_path, held_out=part)
