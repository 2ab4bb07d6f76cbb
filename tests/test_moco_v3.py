"""MoCo v3: two ranks, more views, heads, a ViT."""

import math

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import nn

from conftest import Tiny, close
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.blocks.encoder import Encoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.errors import UserError
from sslzoo.losses import unit
from sslzoo.methods.moco_v3 import MoCoV3
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, batch_size=8, momentum=0.9, weight_decay=1e-3)
TWO, THREE = [(12,)] * 2, [(12,)] * 3
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def make(head="resnet") -> MoCoV3:
    return MoCoV3(Tiny(), SGD, dim=8, hidden=16, head=head, temperature=0.2, momentum=0.9).double()


def make_synced() -> MoCoV3:
    return sync_batchnorm(make("vit"))


def by_hand(method, views):
    q = [unit(method.predictor(method.projector(method.encoder(x)))) for x in views]
    k = [unit(method.target(x)) for x in views]
    total, pairs = 0, [(i, j) for j in range(len(views)) for i in range(len(views)) if i != j]
    for i, j in pairs:
        p = (q[i] @ k[j].T / 0.2).exp()
        total = total - (p.diag() / p.sum(1)).log().mean()
    return 2 * 2 * 0.2 * total / len(pairs)


def test_two_ranks_equal_one_with_three_views():
    batches = random_batches(5, 8, THREE)
    alone = train_alone(make_synced, batches)
    for rank in train_on_ranks(2, make_synced, batches):
        assert_same(alone, rank)


@pytest.mark.parametrize("shapes", [TWO, THREE])
def test_loss_is_the_papers_for_two_views_and_twice_its_mean_over_pairs_for_more(shapes):
    method, (batch,) = make(), random_batches(1, 8, shapes)
    close(method.loss(batch), by_hand(method, batch.views))


def test_each_view_passes_batchnorm_alone():
    method, (batch,) = make(), random_batches(1, 8, TWO)
    method.loss(batch)
    assert method.encoder[1].num_batches_tracked == method.target.copies[0][1].num_batches_tracked == 2


def test_keys_get_no_gradient_and_follow_with_the_momentum_of_the_coming_step():
    method, (batch,) = make(), random_batches(1, 8, TWO)
    method.loss(batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    copy = method.target.copies[0][0].weight
    before = copy.clone()
    with torch.no_grad():
        method.encoder[0].weight += 1
    method.steps, method.step = 4, 1  # the coming step is half-way up the cosine from 0.9 to 1
    method.after_step()
    close(copy, before + 0.05)
    method.step = 3
    before = copy.clone()
    method.after_step()
    assert torch.equal(copy, before)


def test_loss_at_chance_is_the_loss_of_equal_features():
    method, (batch,) = make(), random_batches(1, 8, TWO)
    with torch.no_grad():
        method.predictor[-1].weight.zero_()
    assert method.loss(batch).item() == pytest.approx(method.loss_at_chance()) == pytest.approx(0.8 * math.log(8))


def test_loss_differs_from_lightlys_by_its_candidates_and_scale():
    """lightly contrasts with the other queries and scales nothing; without these the two agree."""
    method, q, k = make(), unit(torch.randn(8, 6).double()), unit(torch.randn(8, 6).double())
    far = torch.cat([q, torch.zeros_like(q)], 1), torch.cat([k, torch.zeros_like(k)], 1)
    both = (method.contrast(*far) + method.contrast(*reversed(far))) / 2 / (2 * method.temperature)
    lightlys = NTXentLoss(temperature=0.2)(q, k)
    within = [(x @ x.T / 0.2).exp().fill_diagonal_(0).sum(1) for x in (q, k)]
    across = (q @ k.T / 0.2).exp()
    excess = sum(torch.log1p(w / a).mean() for w, a in zip(within, (across.sum(1), across.sum(0)), strict=True)) / 2
    close(lightlys, both + excess)


@pytest.mark.parametrize(("head", "dim", "projector"), [("resnet", 2048, 9_445_376), ("vit", 768, 20_987_904)])
def test_heads_have_the_papers_number_of_parameters(head, dim, projector):
    encoder = nn.Identity()
    encoder.dim = dim
    method = MoCoV3(encoder, head=head)
    assert sum(p.numel() for p in method.projector.parameters()) == projector
    assert sum(p.numel() for p in method.predictor.parameters()) == 2_105_344
    linear = [part for part in method.modules() if isinstance(part, nn.Linear)]
    assert all(part.bias is None for part in linear)
    assert isinstance(method.predictor[-1], nn.BatchNorm1d) == (head == "vit")


def test_a_vit_trains_while_its_patches_and_positions_stay():
    encoder = Encoder("vit_tiny_patch16_224", options=VIT)
    adamw = Optim(name="adamw", lr=1e-2, lr_per=None, weight_decay=0.1)
    method = MoCoV3(encoder, adamw, dim=8, hidden=16, head="vit", temperature=0.2, frozen_patches=True)
    fixed = {name: value.clone() for name, value in encoder.net.named_parameters() if not value.requires_grad}
    assert fixed.keys() == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    batches = random_batches(2, 4, [(3, 32, 32)] * 2)
    optimizer = adamw.build(method.parameter_groups())
    before = encoder.net.blocks[0].attn.qkv.weight.clone()
    for batch in batches:
        method.loss(batch._replace(views=[x.float() for x in batch.views])).backward()
        optimizer.step()
        method.after_step()
    assert not torch.equal(encoder.net.blocks[0].attn.qkv.weight, before)
    for net in (encoder.net, method.target.copies[0].net):
        assert all(torch.equal(net.get_parameter(name), value) for name, value in fixed.items())


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="head=mlp is none of resnet, vit"):
        make("mlp")
    with pytest.raises(UserError, match="frozen_patches=true is for timm ViTs"):
        MoCoV3(Encoder("resnet18"), frozen_patches=True)
    with pytest.raises(UserError, match="MoCo v3 compares views"):
        make().loss(random_batches(1, 8, [(12,)])[0])
