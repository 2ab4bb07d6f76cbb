"""Maps and spectra of features."""

import numpy as np
import pytest

from runs import image_set, images
from sslzoo.blocks import Encoder
from sslzoo.report.embedding import look, plane, rows_to_map, spectrum


def clusters(n=60, d=16, apart=20.0):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    z = rng.standard_normal((n, d))
    z[:, 0] += apart * labels
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32), labels


def test_what_is_apart_in_feature_space_is_apart_on_the_map():
    z, labels = clusters()
    points = plane(z)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(len(z))
    assert (labels[distance.argmin(1)] == labels).all()


def test_a_map_is_the_same_every_time():
    z, _ = clusters()
    assert np.array_equal(plane(z), plane(z))


@pytest.mark.parametrize("n", [1, 4, 5, 7])
def test_few_images_have_a_map_too(n):
    assert plane(clusters(n)[0]).shape == (n, 2)


def test_spectrum_is_the_square_root_of_the_covariances_eigenvalues():
    z, _ = clusters(apart=0.0)
    eigenvalues = np.linalg.eigvalsh(np.cov(z.astype(float).T, bias=True))[::-1]
    assert spectrum(z) == pytest.approx(np.sqrt(eigenvalues / eigenvalues[0]), rel=1e-4)


def test_the_spectrum_of_collapsed_features_drops_at_once():
    rng = np.random.default_rng(0)
    plane_only = rng.standard_normal((50, 2)) @ rng.standard_normal((2, 16))
    assert spectrum(plane_only)[2] < 1e-6
    assert np.isfinite(spectrum(np.ones((50, 16)))).all()


def test_rows_are_few_of_few_classes_and_always_the_same():
    images = image_set(300)
    images.labels[:] = np.arange(300) % 30
    rows = rows_to_map(images, 40)
    assert len(rows) == 40
    assert (np.diff(rows) > 0).all()
    assert len(np.unique(images.labels[rows])) <= 10
    assert np.array_equal(rows, rows_to_map(images, 40))
    assert len(rows_to_map(images, 1000)) == 100  # all of ten classes
    images.labels[:] = -1
    assert len(rows_to_map(images, 1000)) == 300


def test_a_look_has_points_spectrum_and_attention_where_there_is_some():
    data = images()
    options = {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3}
    found = look("vit", Encoder("vit_tiny_patch16_224", options=options), data, 100)
    assert found.points.shape == (12, 2)
    assert found.labels.tolist() == data.val.labels.tolist()
    assert found.classes == {0: "red", 1: "green", 2: "blue"}
    assert found.spectrum.shape == (12,)
    assert found.attention.startswith(b"\x89PNG")
    found = look("resnet", Encoder("resnet10t", stem="small", width=0.125), data, 100, mapped=False)
    assert (found.points.shape, found.attention) == ((0, 2), None)
    assert found.spectrum[0] == 1
    data.val = None
    assert len(look("resnet", Encoder("resnet10t", stem="small", width=0.125), data, 100).points) == 24
