"""Features of a set, and their shape on constructed cases."""

import numpy as np
import pytest
import torch

from runs import Pixels, image_set
from sslzoo.blocks import Encoder, LabEncoder, PatchEncoder
from sslzoo.downstream import features as module
from sslzoo.downstream.features import check_size, feature_std, features, layers, rank_me, raw_pixels, unit, unit_parts
from sslzoo.errors import UserError
from sslzoo.views import Clean


def sphere(n: int, d: int) -> np.ndarray:
    z = np.random.default_rng(0).standard_normal((n, d))
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def expected_features(encoder, images, rows):
    x = torch.from_numpy(images.images[rows]).permute(0, 3, 1, 2).double() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.double).view(2, 3, 1, 1)
    h = ((x - mean) / std).flatten(1)
    if encoder is not None:
        h = h @ encoder[1].weight.detach().double().T + encoder[1].bias.detach().double()
    return (h / h.norm(dim=1, keepdim=True)).numpy()


@pytest.mark.parametrize("rows", [None, [7, 3, 3, 20]])
def test_features_are_unit_outputs_in_eval_mode_in_the_order_asked(rows):
    encoder, images = Pixels(dropout=0.5), image_set()
    z, found = features(encoder, images, Clean(8), rows, batch_size=5)
    asked = list(range(24)) if rows is None else rows
    assert found.tolist() == asked
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, expected_features(encoder, images, asked), atol=1e-5)
    assert encoder.training


def test_an_encoder_in_eval_mode_stays_there_and_an_error_puts_a_training_one_back():
    encoder = Pixels().eval()
    features(encoder, image_set(), Clean(8))
    assert not encoder.training
    encoder.train()
    with pytest.raises(RuntimeError):
        features(encoder, image_set(), Clean(9))  # of another size than its layer takes
    assert encoder.training


def test_half_precision_is_close_and_comes_back_as_float32():
    encoder, images = Pixels(dim=16), image_set()
    whole, half = (features(encoder, images, Clean(8), half=half)[0] for half in (False, True))
    assert half.dtype == np.float32
    assert not np.array_equal(whole, half)
    np.testing.assert_allclose(half, whole, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_encoder_that_diverged_is_named(value):
    encoder = Pixels()
    encoder[1].bias.data[2] = value
    with pytest.raises(UserError, match="not finite"):
        features(encoder, image_set(), Clean(8))


ENCODERS = {
    "resnet": lambda: Encoder("resnet10t", stem="small", width=0.125),
    "group norm": lambda: Encoder("resnet10t", stem="small", width=0.5, norm="group"),
    "lab": lambda: LabEncoder("resnet10t", stem="small", width=0.25),
    "patches": lambda: PatchEncoder("resnet10t", stem="small", width=0.125, patch=8, stride=4),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_both_kinds_of_feature_come_from_one_call_and_the_last_is_the_encoders_own(name):
    encoder, x = ENCODERS[name]().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = layers(encoder, x, ("last4", "last"))
        assert list(found) == ["last4", "last"]
        torch.testing.assert_close(found["last"], encoder(x))
        torch.testing.assert_close(found["last4"], torch.cat([each.mean((2, 3)) for each in encoder.maps(x)], 1))
        assert torch.equal(layers(encoder, x)["last"], encoder(x))
    assert check_size(encoder, 16, ("last", "last4")) == {"last": encoder.dim, "last4": sum(encoder.widths)}


def test_the_last_four_layers_of_a_vit_are_its_last_blocks_class_tokens():
    options = {"img_size": 16, "patch_size": 4, "depth": 6, "embed_dim": 24}
    encoder, x = Encoder("vit_tiny_patch16_224", options=options).eval(), torch.randn(2, 3, 16, 16)
    tokens = []
    for block in encoder.net.blocks:
        block.register_forward_hook(lambda block, inputs, output: tokens.append(output))
    with torch.no_grad():
        found = layers(encoder, x, ("last", "last4"))
        expected = torch.cat([encoder.net.norm(each)[:, 0] for each in tokens[-4:]], 1)
        assert len(tokens) == 6
        torch.testing.assert_close(found["last4"], expected)
        torch.testing.assert_close(found["last"], encoder(x))
    torch.testing.assert_close(found["last4"][:, -24:], found["last"])


def test_a_backbone_of_another_image_size_is_told_before_any_work():
    encoder = Encoder("vit_tiny_patch16_224", options={"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 24})
    with pytest.raises(UserError, match=r"takes no images of image_size=20 pixels \(.*\); set image_size to its own"):
        check_size(encoder, 20)


def test_unit_rows_are_the_same_in_parts_and_leave_their_source(monkeypatch):
    z = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    before = z.copy()
    monkeypatch.setattr(module, "PART", 4 * z.shape[1])
    np.testing.assert_array_equal(np.concatenate(list(unit_parts(z))), unit(z))
    np.testing.assert_allclose(np.linalg.norm(unit(z), axis=1), 1, atol=1e-6)
    assert np.array_equal(z, before)


def test_raw_pixels_are_the_normalised_image_as_one_vector():
    images = image_set()
    z, found = raw_pixels(images, Clean(8), [4, 1])
    assert found.tolist() == [4, 1]
    np.testing.assert_allclose(z, expected_features(None, images, [4, 1]), atol=1e-5)


@pytest.mark.parametrize("d", [2, 16, 128])
def test_spread_of_directions_over_the_whole_sphere_is_one(d):
    assert feature_std(sphere(20_000, d)) == pytest.approx(1, abs=0.01)


def test_spread_of_one_point_is_zero_and_of_a_narrow_cone_small():
    point = sphere(1, 32)
    assert feature_std(np.repeat(point, 50, axis=0)) == pytest.approx(0, abs=1e-12)
    cone = point + 0.01 * sphere(500, 32)
    assert 0 < feature_std(cone / np.linalg.norm(cone, axis=1, keepdims=True)) < 0.02


def test_spread_of_two_opposite_points_is_that_of_their_coordinates():
    z = np.array([[0.6, 0.8], [-0.6, -0.8]])
    assert feature_std(z) == pytest.approx((0.6 + 0.8) / 2 * 2**0.5)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_rank_of_equal_singular_values_is_their_number(rank):
    rng = np.random.default_rng(0)
    left, right = np.linalg.qr(rng.standard_normal((40, rank)))[0], np.linalg.qr(rng.standard_normal((16, rank)))[0]
    assert rank_me(7 * left @ right.T) == pytest.approx(rank, rel=1e-4)


def test_rank_is_the_exponential_of_the_entropy_of_singular_values():
    sigma = np.array([5.0, 3.0, 1.0, 0.0])
    p = sigma / 9 + 1e-7
    assert rank_me(np.diag(sigma)) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())))
    assert 2 < rank_me(np.diag(sigma)) < 3


def test_rank_is_measured_on_a_first_part_of_many_rows():
    z = sphere(100, 8)
    assert rank_me(z, limit=30) == rank_me(z[:30])
    assert rank_me(z, limit=30) != rank_me(z)
