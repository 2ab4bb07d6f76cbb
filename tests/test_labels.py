"""Labels that an evaluation cannot use, each told in a line."""

import numpy as np
import pytest

from runs import image_set
from sslzoo.data.images import ImageSet
from sslzoo.downstream.labels import labelled_images, labelled_rows
from sslzoo.errors import UserError


def of(labels) -> ImageSet:
    pixels = image_set(len(labels)).images
    return ImageSet(np.array(labels, np.int64), ["red", "green", "blue"], pixels, None, "noise")


def test_rows_without_a_label_are_left_out():
    train, val = of([0, -1, 1, 2]), of([-1, 2, 0, 1])
    assert [rows.tolist() for rows in labelled_rows("knn", train, val)] == [[0, 2, 3], [1, 2, 3]]
    images, asked = labelled_images("knn", train, val)
    assert (images.labels.tolist(), asked.labels.tolist()) == ([0, 1, 2], [2, 0, 1])
    assert np.array_equal(images.images[1], train.images[2])


def test_a_set_that_is_labelled_throughout_is_not_copied():
    train, val = of([0, 1, 2]), of([0, 1, 2])
    assert labelled_images("knn", train, val)[0] is train


def test_a_part_of_the_labels_is_taken_of_training_images_only():
    images, asked = labelled_images("linear", of([0, 1] * 10), of([0, 1] * 5), fraction=0.2)
    assert (np.bincount(images.labels).tolist(), len(asked)) == ([2, 2], 10)


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        ([-1, -1], [0, 1], "task=knn needs labelled .*; noise has no training labels"),
        ([0, 1], [-1, -1], "noise has no held-out labels"),
        ([0, 1], None, "noise has no held-out labels"),
        ([1, 1, 1], [1], "needs two classes or more; all 3 training images of noise are of green"),
        ([0, 1], [0, 1, 2], r"noise has 1 class among its held-out images that no training image shows \(blue\)"),
    ],
)
def test_labels_that_cannot_be_used_are_one_line(train, val, told):
    with pytest.raises(UserError, match=told):
        labelled_rows("knn", of(train), None if val is None else of(val))


def test_training_classes_that_are_not_held_out_are_named(caplog):
    labelled_rows("knn", of([0, 1, 2]), of([0, 0]))
    assert "noise has no held-out images of 2 classes (green, blue): nothing is measured there" in caplog.text
