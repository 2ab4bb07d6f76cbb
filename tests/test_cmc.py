"""CMC and its encoder: colour spaces, splits, pairs of views, two ranks, accumulation."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from skimage import color, data, filters
from torch import nn

from conftest import Tiny
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.blocks.split import LabEncoder, edges, lab, ycbcr
from sslzoo.errors import UserError
from sslzoo.losses import first_of, unit
from sslzoo.methods.cmc import CMC
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, momentum=0.9, weight_decay=1e-3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TinySplit(nn.Module):
    """Three views of a vector."""

    def __init__(self, views: int = 3):
        super().__init__()
        self.nets = nn.ModuleList(Tiny(4, 6, norm=False) for _ in range(views))
        self.dims = [6] * views

    def split(self, x):
        return [net(part) for net, part in zip(self.nets, x.split(4, dim=1), strict=True)]

    def check(self, x):
        pass


def make_nce() -> CMC:
    return CMC(TinySplit(), SGD, size=64, dim=8, negatives=20, temperature=0.2).double()


def make_softmax() -> CMC:
    return CMC(TinySplit(), SGD, size=64, dim=8, negatives=20, softmax=True).double()


def photograph() -> torch.Tensor:
    """Part of a photograph as ``(1, 3, 96, 96)`` in 0..1."""
    return torch.from_numpy(data.astronaut()[:96, 180:276].copy()).permute(2, 0, 1)[None].double() / 255


def as_image(x: torch.Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).numpy()


def test_lab_is_that_of_skimage():
    cube = torch.cartesian_prod(*[torch.linspace(0, 1, 18)] * 3).T.reshape(1, 3, 54, 108)
    for rgb in (photograph(), cube):
        np.testing.assert_allclose(as_image(lab(rgb)), color.rgb2lab(as_image(rgb)), atol=1e-3)


def test_ycbcr_is_that_of_skimage():
    np.testing.assert_allclose(as_image(ycbcr(photograph())), color.rgb2ycbcr(as_image(photograph())), atol=1e-9)


def test_edges_are_skimages_sobel_of_luminance():
    found = as_image(edges(photograph()))
    np.testing.assert_allclose(found[..., 1], filters.sobel(found[..., 0]), atol=1e-9)


def test_lab_views_are_normalised_by_cmcs_half_ranges():
    encoder = LabEncoder("resnet18", "small", 0.25, mean=MEAN, std=STD)
    rgb = photograph().float()
    x = (rgb - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    luminance, ab = encoder.views(x)
    expected = color.rgb2lab(as_image(rgb))
    np.testing.assert_allclose(as_image(luminance)[..., 0], (expected[..., 0] - 50) / 50, atol=1e-3)
    np.testing.assert_allclose(as_image(ab)[..., 0], (expected[..., 1] - 6.025) / 92.208, atol=1e-3)
    np.testing.assert_allclose(as_image(ab)[..., 1], (expected[..., 2] + 6.6895) / 101.1675, atol=1e-3)


def test_lab_is_converted_in_float32_under_autocast():
    encoder = LabEncoder("resnet18", "small", 0.25)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder.views(x)
    for view, expected in zip(found, encoder.views(x), strict=True):
        torch.testing.assert_close(view, expected)


def test_split_is_two_networks_of_half_the_width_and_forward_their_concatenation():
    encoder = LabEncoder("resnet18", "small", 0.25).eval()
    x = torch.randn(2, 3, 32, 32)
    features = encoder.split(x)
    assert [tuple(h.shape) for h in features] == [(2, 64), (2, 64)] == [(2, width) for width in encoder.dims]
    assert torch.equal(encoder(x), torch.cat(features, dim=1))
    assert encoder.dim == 128
    assert [net.conv1.in_channels for net in encoder.net] == [1, 2]
    luminance, _ = encoder.views(x)
    torch.testing.assert_close(features[0], encoder.net[0](luminance))
    for stage, m in enumerate(encoder.maps(x)):
        assert m.shape == (2, encoder.widths[stage], *[32 // encoder.strides[stage]] * 2)


def test_config_builds_an_encoder_of_the_same_shape():
    encoder = LabEncoder("resnet18", "small", 0.5, colour="ycbcr", channels=[1, 1, 1], mean=(0.5, 0.4, 0.3))
    again = LabEncoder(**encoder.config)
    again.net.load_state_dict(encoder.net.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder.eval()(x), again.eval()(x))
    assert again.config == encoder.config


@pytest.mark.parametrize(
    ("name", "options", "shape", "dims"),
    [
        ("resnet18", {"colour": "none", "channels": [3, 1], "width": 0.25}, (2, 4, 32, 32), [64, 64]),
        ("resnet18", {"colour": "edges", "width": 0.25}, (2, 3, 32, 32), [64, 64]),
        ("resnet18", {"colour": "none", "channels": [1, 1, 1, 1], "width": 0.5}, (2, 4, 32, 32), [64] * 4),
        ("convnext_atto", {}, (2, 3, 32, 32), [320] * 2),
    ],
)
def test_other_views_and_networks(name, options, shape, dims):
    encoder = LabEncoder(name, **options).eval()
    assert [h.shape[1] for h in encoder.split(torch.randn(shape))] == encoder.dims == dims


def test_gray_images_have_no_colour_to_contrast():
    encoder = LabEncoder("resnet18", "small", 0.25)
    gray = (torch.rand(4, 1, 16, 16) - encoder.mean) / encoder.std
    with pytest.raises(UserError, match=r"set encoder\.colour=edges"):
        encoder.check(gray)
    encoder.check((torch.rand(4, 3, 16, 16) - encoder.mean) / encoder.std)
    LabEncoder("resnet18", "small", 0.25, colour="edges").check(gray)


def test_gray_images_are_looked_for_in_the_first_batch_only(monkeypatch):
    calls = []
    monkeypatch.setattr(TinySplit, "check", lambda self, x: calls.append(x))
    method = make_nce()
    for batch in random_batches(3, 8, [(12,)]):
        method.loss(batch)
    assert len(calls) == 1


def test_views_looked_at_before_the_run_are_not_looked_at_again(monkeypatch):
    calls = []
    monkeypatch.setattr(TinySplit, "check", lambda self, x: calls.append(x))
    method, (batch,) = make_nce(), random_batches(1, 8, [(12,)])
    method.check_views(batch.views)
    assert calls == batch.views
    method.loss(batch)
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{"colour": "hsv"}, {"channels": [3, 1]}, {"channels": [3]}, {"colour": "none"}])
def test_impossible_splits_are_refused(options):
    with pytest.raises(UserError, match=r"encoder\.(colour|channels)="):
        LabEncoder("resnet18", "small", 0.25, **options)


def test_images_of_other_channels_are_refused():
    encoder = LabEncoder("resnet18", "small", 0.25, colour="none", channels=[3, 1])
    with pytest.raises(UserError, match="needs images of 4 channels, these have 3"):
        encoder(torch.randn(2, 3, 16, 16))
    with pytest.raises(UserError, match="needs images of 4 channels, these have 3"):
        encoder.check(torch.randn(2, 3, 16, 16))


def test_all_ordered_pairs_of_three_views_are_contrasted():
    method, (batch,) = make_softmax(), random_batches(1, 8, [(12,)])
    z = [unit(p(h)) for p, h in zip(method.projectors, method.encoder.split(batch.views[0]), strict=True)]
    drawn = method.banks[0].sample(batch.index, 20)
    expected = 0
    for a, b in permutations(range(3), 2):
        scores = torch.stack([method.banks[b].slots[drawn[i]] @ z[a][i] for i in range(8)]) / 0.07
        expected = expected + first_of(scores)
    torch.testing.assert_close(method.loss(batch), expected)


def test_two_ranks_equal_one():
    batches = random_batches(5, 8, [(12,)])
    alone = train_alone(make_nce, batches)
    first, second = train_on_ranks(2, make_nce, batches)
    assert_same(alone, first)  # Z included
    assert torch.equal(first["state"]["banks.1.slots"], second["state"]["banks.1.slots"])


def test_accumulating_two_halves_equals_one_batch():
    batches = random_batches(5, 8, [(12,)])
    assert_same(train_alone(make_softmax, batches), train_alone(make_softmax, batches, accumulate=2))


def test_loss_at_chance_is_the_loss_of_equal_scores():
    for make, chance in ((make_softmax, 6 * math.log(21)), (make_nce, 6 * (math.log(21) + 20 * math.log(21 / 20)))):
        method, (batch,) = make(), random_batches(1, 8, [(12,)])
        for bank in method.banks:
            bank.slots.zero_()
        assert method.loss_at_chance() == pytest.approx(chance)
        assert method.loss(batch).item() == pytest.approx(chance, abs=1e-3)


def test_encoders_that_split_nothing_and_missing_sizes_are_refused():
    with pytest.raises(UserError, match="LabEncoder"):
        CMC(Tiny(), SGD, size=64)
    with pytest.raises(UserError, match="number of training images"):
        CMC(TinySplit(), SGD)
    with pytest.raises(UserError, match="negatives=65"):
        CMC(TinySplit(), SGD, size=64, negatives=65)
