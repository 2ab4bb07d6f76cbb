"""lightly 1.6's losses against ours where they are the same, and what is known to differ.

Beside these: its NT-Xent in test_simclr, test_losses and test_moco_v3, its SwAV loss and its Sinkhorn's overflow in
test_swav, its DINO loss in test_dino, its negative cosine in test_byol and test_simsiam.
"""

import pytest
import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models.modules.memory_bank import MemoryBankModule

from conftest import Tiny, close, on_ranks
from ranks import random_batches
from sslzoo import dist
from sslzoo.losses import info_nce, nt_xent, unit
from sslzoo.memory import Queue
from sslzoo.methods.byol import BYOL
from sslzoo.methods.dino import DINO
from sslzoo.methods.moco import MoCo
from sslzoo.methods.simsiam import SimSiam
from sslzoo.methods.swav import sinkhorn

TWO = [(12,)] * 2


def rows(count: int, dim: int = 6) -> torch.Tensor:
    return unit(torch.randn(count, dim, dtype=torch.double))


# Whole methods


def test_mocos_steps_are_lightlys_with_its_memory_bank():
    """Its loss takes the negatives and pushes the keys itself; ours pushes once the optimizer has stepped."""
    method = MoCo(Tiny(norm=False), dim=6, queue_size=16, bn_groups=1, temperature=0.2).double()
    peer = NTXentLoss(temperature=0.2, memory_bank_size=(16, 6)).double()
    peer.memory_bank.bank.copy_(method.queue.keys)
    for batch in random_batches(4, 4, TWO):
        q = method.projector(method.encoder(batch.views[0]))
        close(method.loss(batch).detach(), peer(q, method.target(batch.views[1])).detach())
        method.after_step()
        close(method.queue.keys, peer.memory_bank.bank)


@pytest.mark.parametrize(("method", "scale", "shift"), [(SimSiam, 1, 0), (BYOL, 4, 4)], ids=["simsiam", "byol"])
def test_simsiam_and_byol_are_lightlys_negative_cosine_both_ways(method, scale, shift):
    """lightly's examples take the mean of both ways; BYOL's distance is ``2 - 2 cos``, and both ways are summed."""
    made = method(Tiny(), dim=6).double()
    (batch,) = random_batches(1, 8, TWO)
    target = made.target if method is BYOL else torch.nn.Sequential(made.encoder, made.projector)
    z = [target(x).detach() for x in batch.views]
    p = [made.predictor(made.projector(made.encoder(x))) for x in batch.views]
    both = sum(NegativeCosineSimilarity()(p[i], z[1 - i]) for i in (0, 1)) / 2
    close(made.loss(batch).detach(), (scale * both + shift).detach())


# The memory bank


def test_lightlys_bank_is_not_saved_and_ours_is():
    assert not MemoryBankModule((16, 6)).state_dict()
    assert Queue(16, 6).state_dict().keys() == {"keys", "pointer"}


def test_lightlys_bank_drops_what_does_not_fit_before_its_end_and_ours_goes_on_at_the_start():
    theirs, ours = MemoryBankModule((10, 6)), Queue(10, 6)
    theirs.bank.copy_(ours.keys)
    first, second = rows(6).float(), rows(6).float()
    for z in (first, second):
        theirs(z, update=True)
        ours.push(z)
    assert torch.equal(theirs.bank, torch.cat([first, second[:4]]))
    assert torch.equal(ours.keys, torch.cat([second[4:], first[2:], second[:4]]))


# Ranks: gathering is lightly's option, and ours always


def _on_a_rank(rank, z1, z2, scores, t, s):
    z1, z2, scores = dist.mine(z1), dist.mine(z2), dist.mine(scores)
    t, s = (torch.cat([dist.mine(view) for view in x.chunk(2)]) for x in (t, s))
    banks = {gather: MemoryBankModule((16, 6), gather_distributed=gather) for gather in (False, True)}
    queue = Queue(16, 6)
    for bank in banks.values():
        bank(z1.float(), update=True)
    queue.push(z1)
    dino, peer = DINO(Tiny(), hidden=10, bottleneck=5, out_dim=6).double(), DINOLoss(6).double()
    losses = dino.distillation(s, t), peer([*t.chunk(2)], [*s.chunk(2)])
    dino.after_step()
    return {
        "nt_xent": nt_xent(z1, z2, 0.3),
        "lightly's nt_xent": {g: NTXentLoss(0.3, gather_distributed=g)(z1, z2) for g in banks},
        "codes": sinkhorn(scores, 0.5, 3),
        "lightly's codes": {g: lightly_sinkhorn(scores, 3, 0.5, gather_distributed=g) for g in banks},
        "keys": queue.keys,
        "lightly's keys": {g: bank.bank for g, bank in banks.items()},
        "dino": losses,
        "centers": (dino.center, peer.center[0]),
    }


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    return rows(8), rows(8), torch.randn(8, 5).double(), torch.randn(16, 6).double(), torch.randn(16, 6).double()


@pytest.fixture(scope="module")
def ranks(given):
    return on_ranks(2, _on_a_rank, *given)


def test_nt_xent_over_ranks_is_lightlys_only_if_that_is_told_to_gather(given, ranks):
    z1, z2, *_ = given
    for found in ranks:
        close(found["nt_xent"], found["lightly's nt_xent"][True])
        assert not torch.isclose(found["nt_xent"], found["lightly's nt_xent"][False])
    close(sum(found["nt_xent"] for found in ranks) / 2, nt_xent(z1, z2, 0.3))


def test_codes_over_ranks_are_lightlys_only_if_that_is_told_to_gather(given, ranks):
    whole = sinkhorn(given[2], 0.5, 3).chunk(2)
    for found, expected in zip(ranks, whole, strict=True):
        close(found["codes"], expected)
        close(found["lightly's codes"][True], expected)
        assert not torch.allclose(found["lightly's codes"][False], expected)


def test_keys_of_all_ranks_are_in_lightlys_bank_only_if_that_is_told_to_gather(given, ranks):
    z1 = given[0].float()
    for rank, found in enumerate(ranks):
        assert torch.equal(found["keys"][:8], z1)
        assert torch.equal(found["lightly's keys"][True][:8], z1)
        assert torch.equal(found["lightly's keys"][False][:4], z1.chunk(2)[rank])
        assert not torch.allclose(found["lightly's keys"][False][4:8], z1[4:])


def test_dinos_center_is_over_all_ranks_in_both(ranks):
    for found in ranks:
        close(*found["dino"])
        close(*found["centers"])
    close(ranks[0]["centers"][0], ranks[1]["centers"][0])


def test_info_nce_has_no_bound_of_its_own_on_the_temperature_and_lightly_agrees_at_a_small_one():
    q, k, keys = rows(4), rows(4), rows(12)
    peer = NTXentLoss(temperature=0.01, memory_bank_size=(12, 6)).double()
    peer.memory_bank.bank.copy_(keys)
    close(info_nce(q, k, keys, 0.01), peer(q, k))
