"""CPC, its patches and its context network: who sees what, the loss, directions, two ranks, accumulation."""

import math

import pytest
import torch
from torch import nn

from conftest import Tiny
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.blocks.context import Context
from sslzoo.blocks.patches import DRAWS, PatchEncoder, distorted
from sslzoo.errors import UserError
from sslzoo.methods.cpc import CPC, patch_info_nce
from sslzoo.optim import Optim

ADAM = Optim(name="adamw", lr=1e-2, lr_per=None, weight_decay=0.0)
SMALL = {"name": "resnet18", "stem": "small", "width": 0.25, "patch": 8, "stride": 6}


class TinyPatches(nn.Module):
    """A PatchEncoder of one linear layer: patches of 4 pixels every 2."""

    patches = PatchEncoder.patches
    patch, stride, dim = 4, 2, 6

    def __init__(self):
        super().__init__()
        self.net = Tiny(48, 6, norm=False)

    def encode(self, patches):
        return self.net(patches.flatten(3))


def make() -> CPC:
    options = {"dim": 5, "offsets": (1, 2, 3), "hidden": 4, "blocks": 2, "group": 2}
    return CPC(TinyPatches(), ADAM, directions=4, crop=1, drop=0.5, flip=True, **options).double()


def images(steps: int = 1, size: int = 8):
    return random_batches(steps, size, [(3, 10, 10)])  # a grid of 4 x 4


def test_patches_overlap_row_by_row():
    x = torch.arange(2 * 3 * 20 * 20.0).view(2, 3, 20, 20)
    patches = PatchEncoder(**SMALL).patches(x)
    assert patches.shape == (2, 3, 3, 3, 8, 8)
    assert torch.equal(patches[1, 2, 1], x[1, :, 12:20, 6:14])


def test_grid_is_the_network_on_each_patch_and_forward_its_mean():
    encoder, x = PatchEncoder(**SMALL).eval(), torch.randn(2, 3, 32, 32)
    grid = encoder.grid(x)
    assert grid.shape == (2, 5, 5, encoder.dim) == (2, 5, 5, 64)
    torch.testing.assert_close(grid[:, 1, 3], encoder.net(x[:, :, 6:14, 18:26]))
    torch.testing.assert_close(encoder(x), grid.mean((1, 2)))


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_a_patch_knows_of_no_other(norm):
    encoder = PatchEncoder(**SMALL, norm=norm).train()
    x, y = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    y[0, :, :8, :8] = x[0, :, :8, :8]
    torch.testing.assert_close(encoder.grid(x)[0, 0, 0], encoder.grid(y)[0, 0, 0])
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "efficientnet_lite0"])
def test_batchnorm_of_any_kind_is_replaced_and_its_activation_kept(name):
    encoder = PatchEncoder(name, stages=4)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    before = sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in PatchEncoder(name, stages=4, norm="none").modules())
    assert before == sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in encoder.modules()) > 0


def test_without_a_norm_features_do_not_grow_with_depth():
    deep = PatchEncoder("resnet101", width=0.25, norm="none")
    shallow = PatchEncoder("resnet50", width=0.25, norm="none")
    x = torch.randn(2, 3, 128, 128)
    assert 0.2 < deep.grid(x).std() / shallow.grid(x).std() < 5


def test_stages_and_maps():
    encoder, whole = PatchEncoder(**SMALL, stages=3), PatchEncoder(**SMALL, stages=4)
    assert (encoder.dim, whole.dim) == (64, 128)
    assert (encoder.widths, encoder.strides) == ([16, 32, 64], [1, 2, 4])
    for stages in (encoder, whole):
        maps = stages.maps(torch.randn(2, 3, 32, 32))
        sizes = zip(stages.widths, stages.strides, strict=True)
        assert [tuple(m.shape) for m in maps] == [(2, width, 32 // stride, 32 // stride) for width, stride in sizes]


def test_config_builds_an_encoder_of_the_same_shape():
    encoder = PatchEncoder(**SMALL, norm="none", options={"layers": [1, 1, 1, 1]})
    again = PatchEncoder(**encoder.config)
    again.net.load_state_dict(encoder.net.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(x), again(x))
    assert again.config == encoder.config


@pytest.mark.parametrize(("size", "fits"), [(6, 20), (14, 20), (16, 20), (30, 32)])
def test_grids_that_do_not_fit_are_refused(size, fits):
    with pytest.raises(UserError, match=f"an image of {size}; set image_size={fits}"):
        PatchEncoder(**SMALL)(torch.randn(2, 3, size, size))
    PatchEncoder(**SMALL)(torch.randn(2, 3, fits, fits))


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"stages": 5}, {"name": "convnext_atto", "stages": 3}])
def test_impossible_patch_encoders_are_refused(options):
    with pytest.raises(UserError, match=r"encoder\.(norm|stages)="):
        PatchEncoder(**options)


@pytest.mark.parametrize(("blocks", "rows", "columns"), [(1, slice(2, 4), slice(1, 4)), (3, slice(0, 4), slice(0, 5))])
def test_context_of_a_row_sees_it_and_rows_above_one_further_for_each_block(blocks, rows, columns):
    z = torch.randn(1, 5, 5, 6, requires_grad=True)
    context = Context(6, 8, blocks)(z)
    assert context.shape == z.shape
    seen = torch.autograd.grad(context[0, 3, 2].sum(), z)[0].abs().sum((0, 3)) > 0
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[rows, columns] = True
    assert torch.equal(seen, expected)


def test_distortions_keep_shape_and_do_what_they_say():
    patches, drawn = torch.rand(8, 3, 3, 3, 8, 8) + 1, torch.randint(2**32, (8, 9 * DRAWS))
    assert torch.equal(distorted(patches, drawn), patches)
    cropped = distorted(patches, drawn, crop=2)
    assert ((cropped != 0).sum((3, 4, 5)) == 3 * 6 * 6).all()
    assert torch.equal(cropped[cropped != 0], patches[cropped != 0])
    dropped = distorted(patches, drawn, drop=1.0)
    assert ((dropped != 0).any(-1).any(-1).sum(3) == 1).all()
    half = ((distorted(patches, drawn, drop=0.5) != 0).any(-1).any(-1).sum(3) == 1).double().mean()
    assert 0.25 < half < 0.75
    flipped = distorted(patches, drawn, flip=True)
    same = (flipped == patches).all(-1).all(-1).all(-1)
    assert 0.25 < same.double().mean() < 0.75
    assert torch.equal(flipped[~same], patches[~same].flip(-1))
    jittered, plain = distorted(patches, drawn, jitter=0.5).double(), patches.double()
    for place in [(0, 0, 0), (5, 2, 1)]:
        u = 2 * drawn.view(8, 3, 3, DRAWS)[place][5:] / 2**32 - 1
        expected = [plain[place][k] * math.exp(0.5 * u[0]) + 0.5 * u[k + 1] for k in range(3)]
        torch.testing.assert_close(jittered[place], torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert len((jittered - plain).mean((-1, -2)).round(decimals=6).unique()) > 200


@pytest.mark.parametrize("group", [2, 4])
def test_info_nce_is_the_papers_formula(group):
    b, g, d, k = 4, 4, 5, 2
    p, t = torch.randn(b, g - k, g, d, dtype=torch.double), torch.randn(b, g, g, d, dtype=torch.double)
    total = 0.0
    for i in range(b):
        candidates = t[i // group * group : (i // group + 1) * group].reshape(-1, d)
        for r in range(g - k):
            for c in range(g):
                scores = candidates @ p[i, r, c] * 0.1
                total += (scores.logsumexp(0) - 0.1 * t[i, r + k, c] @ p[i, r, c]).item()
    assert patch_info_nce(p, t, k, 0.1, group).item() == pytest.approx(total / (b * (g - k) * g))


def test_a_prediction_is_trained_by_targets_below_it_and_not_by_their_features_above():
    method, (batch,) = make(), images()
    z = method.encoder.encode(method.encoder.patches(batch.views[0])).detach().requires_grad_()
    c = method.contexts[0](z)
    method.predictors[0][1](c[:, :-2])[0, 0].sum().backward()  # row 0 predicting row 2
    assert z.grad[0, 0].abs().sum() > 0
    assert z.grad[0, 1:].abs().sum() == 0


def test_each_direction_and_each_offset_has_weights_of_its_own():
    method, (batch,) = make(), images()
    method.loss(batch).backward()
    assert len(method.contexts) == 4
    assert [len(direction) for direction in method.predictors] == [3] * 4
    weights = [predict[0].weight.grad for direction in method.predictors for predict in direction]
    assert all(w.abs().sum() > 0 for w in weights)
    assert len({w.sum().item() for w in weights}) == 12


def test_each_direction_is_downwards_of_a_turned_image():
    method, (batch,) = make(), images()
    method.crop, method.drop, method.flip = 0, 0.0, False
    z = method.encoder.encode(method.encoder.patches(batch.views[0]))  # (B, 4, 4, D)
    t = method.projector(z)
    total = 0.0
    for k, (context, predictors) in enumerate(zip(method.contexts, method.predictors, strict=True)):
        for _ in range(k):  # a quarter turn by hand: columns become rows, from the last on
            z, t = z.transpose(1, 2).flip(1), t.transpose(1, 2).flip(1)
        total = total + method.downwards(z, t, context, predictors)
        for _ in range(k):
            z, t = z.flip(1).transpose(1, 2), t.flip(1).transpose(1, 2)
    torch.testing.assert_close(method.loss(batch), total / 4)


def test_two_ranks_equal_one():
    batches = images(5)
    alone = train_alone(make, batches)
    for rank in train_on_ranks(2, make, batches):
        assert_same(alone, rank)


def test_accumulating_two_halves_equals_one_batch():
    assert_same(train_alone(make, images(5)), train_alone(make, images(5), accumulate=2))


def test_patches_are_distorted_anew_each_step_but_the_same_if_asked_again():
    method, (batch,) = make(), images()
    first, again = method.loss(batch), method.loss(batch)
    method.step = 1
    assert first == again != method.loss(batch)


def test_loss_at_chance_is_the_loss_of_equal_patches():
    method, (batch,) = make(), images()
    assert method.loss_at_chance() is None
    nn.init.zeros_(method.projector[0].weight)
    assert method.loss(batch).item() == pytest.approx(method.loss_at_chance()) == pytest.approx(3 * math.log(2 * 16))


def test_what_does_not_fit_is_refused():
    (batch,) = images()
    with pytest.raises(UserError, match="PatchEncoder"):
        CPC(Tiny(), ADAM)
    with pytest.raises(UserError, match="must be 1 or 4"):
        CPC(TinyPatches(), ADAM, directions=2)
    with pytest.raises(UserError, match=r"offsets=\[4\] reach beyond a grid of 4 x 4 patches; the largest is 3"):
        CPC(TinyPatches(), ADAM, offsets=(4,), group=2).double().loss(batch)
    with pytest.raises(UserError, match="group=3 does not divide a batch of 8"):
        CPC(TinyPatches(), ADAM, offsets=(1,), group=3).double().loss(batch)


def test_a_few_views_tell_before_the_run_whether_offsets_fit_and_what_chance_is():
    method = make()
    with pytest.raises(UserError, match=r"offsets=\[1, 2, 3\] reach beyond a grid of 3 x 3 patches; the largest is 2"):
        method.check_views([torch.randn(1, 3, 8, 8)])
    with pytest.raises(UserError, match="do not fill a grid"):
        method.check_views([torch.randn(1, 3, 9, 9)])
    method.check_views([torch.randn(1, 3, 10, 10)])  # fewer images than a group: only their size is looked at
    assert method.loss_at_chance() == pytest.approx(3 * math.log(2 * 16))
