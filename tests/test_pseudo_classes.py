"""Pseudo-labels of classes: what is sure, how classes are made equal, what is kept on disk, how it is judged."""

import numpy as np
import pytest

from runs import image_set
from sslzoo.data.pseudo_classes import PseudoClasses, quality
from sslzoo.errors import UserError
from sslzoo.selftrain import confident, equal_classes


def softmax(rows: int, classes: int = 3, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    """A teacher's probabilities, ``(rows, classes)`` float32."""
    z = np.exp(np.random.default_rng(seed).normal(0, spread, (rows, classes)))
    return (z / z.sum(1, keepdims=True)).astype(np.float32)


def test_images_of_the_threshold_or_more_are_confident():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.1, 0.0, 0.9], [0.2, 0.5, 0.3]])
    assert confident(probabilities).tolist() == [0, 2, 3]
    assert confident(probabilities, 0.3).tolist() == [0, 1, 2, 3]
    assert confident(probabilities, 0.91).tolist() == []
    assert confident(probabilities[:0], 0).tolist() == []


@pytest.mark.parametrize("threshold", [1.5, -0.1, "match-density", True])
def test_other_thresholds_are_refused(threshold):
    with pytest.raises(UserError, match=f"threshold={threshold} is no probability"):
        confident(softmax(4), threshold)


@pytest.mark.parametrize("per_class", [1, 7, 40])
def test_each_class_has_as_many_images_and_they_are_its_most_confident(per_class):
    probabilities = softmax(60)
    rows = confident(probabilities, 0.6)
    taken = equal_classes(probabilities, rows, per_class)
    expected = []
    for label in range(3):
        of_class = [i for i in rows.tolist() if probabilities[i].argmax() == label]
        of_class.sort(key=lambda i: -probabilities[i].max())
        assert 7 < len(of_class) < 40  # some are left out, some repeated
        expected += [of_class[k % len(of_class)] for k in range(per_class)]
    assert taken.tolist() == expected
    assert np.bincount(probabilities[taken].argmax(1)).tolist() == [per_class] * 3
    counts = np.unique(taken, return_counts=True)[1]
    assert counts.max() - counts.min() <= (per_class == 40) * 2


def test_a_class_that_nothing_shows_stays_empty():
    probabilities = softmax(20)
    probabilities[:, 1] = 0
    taken = equal_classes(probabilities, np.arange(20), 8)
    assert np.bincount(probabilities[taken].argmax(1), minlength=3).tolist() == [8, 0, 8]
    assert equal_classes(probabilities, np.arange(0), 8).tolist() == []


@pytest.fixture
def pseudo():
    """Of the noise of ``image_set`` the last 14 of 24 images, two of them taken twice."""
    return PseudoClasses(np.arange(10, 24), softmax(14), np.array([2, 3, 3, 7, 13, 2]))


def test_a_students_images_are_those_taken_with_soft_or_hard_labels(pseudo):
    whole = image_set(24)
    soft, hard = pseudo.images(whole, soft=True), pseudo.images(whole, soft=False)
    for images in (soft, hard):
        assert len(images) == 6
        assert np.array_equal(images.images, whole.images[[12, 13, 13, 17, 23, 12]])
    assert np.array_equal(soft.labels, pseudo.probabilities[[2, 3, 3, 7, 13, 2]])
    assert np.array_equal(hard.labels, soft.labels.argmax(1))
    assert np.array_equal(whole.labels, image_set(24).labels)  # nobody's true labels were overwritten


def test_they_come_back_from_the_file_as_they_were(pseudo, tmp_path):
    path = pseudo.write(tmp_path / "labels.npz", image_set(24))
    found = PseudoClasses.read(path, image_set(24))
    for name in ("rows", "probabilities", "taken"):
        mine, theirs = getattr(pseudo, name), getattr(found, name)
        assert np.array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    assert [file.name for file in tmp_path.iterdir()] == ["labels.npz"]  # nothing temporary is left


def test_a_write_that_fails_leaves_the_file_that_was_there(pseudo, tmp_path, monkeypatch):
    path = pseudo.write(tmp_path / "labels.npz", image_set(24))
    before = path.read_bytes()

    def full(file, **_):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        pseudo.write(path, image_set(24))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["labels.npz"]


def test_pseudo_labels_of_other_images_are_refused(pseudo, tmp_path):
    path = pseudo.write(tmp_path / "labels.npz", image_set(24))
    with pytest.raises(UserError, match="other images or classes than those of noise"):
        PseudoClasses.read(path, image_set(24, seed=5))
    renamed = image_set(24)
    renamed.classes = ["red", "green", "violet"]
    with pytest.raises(UserError, match="other images or classes"):
        PseudoClasses.read(path, renamed)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "labels.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no pseudo-labels"):
        PseudoClasses.read(path, image_set(24))
    np.savez(path, rows=np.arange(3))
    with pytest.raises(UserError, match="holds no pseudo-labels"):
        PseudoClasses.read(path, image_set(24))
    with pytest.raises(UserError, match="are no file"):
        PseudoClasses.read(tmp_path / "none.npz", image_set(24))


def test_the_share_that_is_right_is_that_of_a_loop_and_counts_an_image_once(pseudo):
    labels = image_set(24).labels
    labels[[13, 20]] = -1  # one of them taken, one not
    found = quality(pseudo, labels)
    right = {i: bool(pseudo.probabilities[i].argmax() == labels[10 + i]) for i in range(14) if labels[10 + i] >= 0}
    taken = [i for i in (2, 3, 7, 13) if i in right]
    assert found == {
        "right": pytest.approx(sum(right[i] for i in taken) / 3),
        "right_of_all": pytest.approx(sum(right.values()) / 12),
        "judged_images": 3,
    }
    assert quality(pseudo, np.full(24, -1)) == {}
    none = PseudoClasses(pseudo.rows, pseudo.probabilities, np.arange(0))
    assert quality(none, labels)["right"] is None
