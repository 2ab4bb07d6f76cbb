"""NAS-FPN: its cell is the published one, whatever the sizes of its maps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sslzoo.downstream.nas_fpn import LEVELS, NASFPN, NODES, Cell, resampled
from sslzoo.downstream.necks import group_norm

# Levels counted from the coarsest, 0 for sum and 1 for attention, and two inputs: how the authors' code has it
PUBLISHED = (3, 1, 1, 3, 3, 0, 1, 5, 4, 0, 0, 6, 3, 0, 6, 7, 2, 1, 7, 8, 0, 1, 6, 9, 1, 1, 9, 10)


def maps(side: int, channels: int, batch: int = 2, levels=LEVELS) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, -(-side // 2**level), -(-side // 2**level)).double() for level in levels]


def test_the_nodes_are_the_published_ones():
    for i, node in enumerate(NODES):
        level, attention, *inputs = PUBLISHED[4 * i : 4 * i + 4]
        assert node.level == LEVELS[::-1][level]
        assert node.combine == ("attention" if attention else "sum")
        assert node.inputs == tuple(inputs)
        assert node.output == (i >= len(NODES) - len(LEVELS))


def step_by_step(cell: Cell, levels: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The cell written out, each node with its own two maps, for an image of 256 pixels: P3 of 32, P7 of 2."""

    def up(x, times):
        return x.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)

    def down(x, times):
        return x.unfold(2, times, times).unfold(3, times, times).amax((-1, -2))

    def gate(coarse, fine):
        attention = 1 / (1 + (-coarse.flatten(2).max(dim=2).values).exp())
        return coarse + fine * attention[:, :, None, None]

    p3, p4, p5, p6, p7 = levels
    c = cell.convs
    n5 = c[0](gate(up(p6, 4), p4))
    n6 = c[1](p4 + n5)
    n7 = c[2](p3 + up(n6, 2))
    n8 = c[3](n6 + down(n7, 2))
    n9 = c[4](gate(down(n8, 2), down(n7, 4)) + p5)  # nobody else has used p5
    n10 = c[5](gate(down(n9, 4), down(n6, 8)) + p7)
    n11 = c[6](gate(up(n10, 2), down(n9, 2)))
    return {3: n7, 4: n8, 5: n9, 6: n11, 7: n10}


def test_a_cell_equals_the_same_written_out():
    cell = Cell(6, nn.BatchNorm2d).double()
    levels = maps(256, 6)
    wanted = step_by_step(cell, levels)
    for level, found in zip(LEVELS, cell(levels), strict=True):
        torch.testing.assert_close(found, wanted[level], rtol=1e-12, atol=1e-12)


def test_convolutions_are_relu_then_separable_then_norm():
    conv = Cell(6, nn.BatchNorm2d).convs[0].eval().double()
    x = torch.randn(1, 6, 5, 5).double()
    depthwise, pointwise = conv[1].weight, conv[2].weight
    dense = pointwise[:, :, 0, 0, None, None] * depthwise[:, 0][None]  # (out, in, 3, 3)
    wanted = F.conv2d(x.clamp(min=0), dense, conv[2].bias, padding=1) / (1 + conv[3].eps) ** 0.5
    torch.testing.assert_close(conv(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [32, 72, 96, 130, 513])
def test_levels_keep_their_sizes_where_these_are_no_powers_of_two(side):
    levels = maps(side, 4, levels=LEVELS[:3])
    net = NASFPN([4, 4, 4], 8, 2, group_norm).double()
    found = net(levels)
    sides = [-(-side // 2**level) for level in LEVELS]
    assert [each.shape for each in found] == [(2, 8, n, n) for n in sides]
    sum(each.sum() for each in found).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_levels_that_are_missing_are_the_last_one_pooled():
    levels = maps(128, 8, levels=LEVELS[:4])
    net = NASFPN([8] * 4, 8, 1, None)  # maps of the right width go in as they are
    seen = []
    net.cells[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    net.double()(levels)
    assert len(net.cells) == 1
    assert all(torch.equal(a, b) for a, b in zip(seen, levels, strict=False))
    assert torch.equal(seen[4], F.max_pool2d(levels[3], 2))


def test_a_map_meets_another_level_at_its_size():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert resampled(x, 4, 3, torch.Size([5, 6])).tolist()[0][0][4] == [6, 6, 7, 7, 8, 8]
    assert resampled(x, 4, 5, torch.Size([2, 2])).tolist() == [[[[4, 5], [7, 8]]]]
    assert resampled(x, 4, 4, torch.Size([3, 3])) is x
