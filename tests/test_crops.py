"""Multi-crop: one call per resolution, order kept."""

import pytest
import torch

from sslzoo.blocks.crops import at_least_two, by_resolution
from sslzoo.errors import UserError


def crops(*sizes, batch=3):
    return [torch.randn(batch, 3, size, size) for size in sizes]


def test_each_run_of_one_resolution_is_one_call_and_rows_are_crop_major():
    views, called = crops(8, 8, 4, 4, 4), []

    def forward(x):
        called.append(tuple(x.shape))
        return x.mean((2, 3))

    found = by_resolution(forward, views)
    assert called == [(6, 3, 8, 8), (9, 3, 4, 4)]
    for one, view in zip(found.chunk(5), views, strict=True):
        torch.testing.assert_close(one, view.mean((2, 3)))


def test_order_survives_resolutions_that_alternate():
    views = crops(8, 4, 8)
    torch.testing.assert_close(
        by_resolution(lambda x: x.mean((2, 3)), views), torch.cat([x.mean((2, 3)) for x in views])
    )


def test_batchnorm_sees_all_crops_of_one_resolution_together_and_no_others():
    norm, views = torch.nn.BatchNorm2d(3), crops(8, 8, 4)
    found = by_resolution(lambda x: norm(x).flatten(1).mean(1, keepdim=True), views)
    whole = torch.cat(views[:2])
    expected = (whole - whole.mean((0, 2, 3), keepdim=True)) / whole.var((0, 2, 3), unbiased=False, keepdim=True).sqrt()
    torch.testing.assert_close(found[:6], expected.flatten(1).mean(1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert norm.num_batches_tracked == 2


def test_gradients_reach_every_view():
    views = [x.requires_grad_() for x in crops(8, 8, 4)]
    by_resolution(lambda x: x.square().mean((2, 3)), views).sum().backward()
    assert all((x.grad != 0).any() for x in views)


def test_one_view_is_no_pair():
    views = crops(8)
    with pytest.raises(UserError, match=r"SwAV compares views of an image but .* give 1; choose views of at least 2"):
        at_least_two(views, "SwAV")
