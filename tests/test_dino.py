"""DINO: loss, center, teacher, schedules, two ranks, accumulation, bad input."""

import math

import pytest
import torch
from lightly.loss import DINOLoss
from timm.layers import DropPath
from torch import nn

from conftest import Tiny
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.blocks import Encoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.config import built, composed
from sslzoo.errors import UserError
from sslzoo.method import Batch
from sslzoo.methods.dino import DINO, DINOHead
from sslzoo.optim import Optim

ADAMW = Optim(name="adamw", lr=1e-2, lr_per=None, weight_decay=0.04, final_weight_decay=0.4, exclude="bias_and_norm")
SGD = Optim(lr=0.1, lr_per=None, momentum=0.9)
CROPS = [(12,)] * 4


def make(optim=ADAMW, norm=False, **options) -> DINO:
    options = {"freeze_last_layer": 0, "momentum": 0.9} | options
    return DINO(Tiny(norm=norm), optim, hidden=10, bottleneck=5, out_dim=9, **options).double()


def make_free_g(optim=ADAMW, **options) -> DINO:
    """Clipped, frozen for one of five epochs, with a last layer whose norm is learned."""
    method = make(optim, norm_last_layer=False, freeze_last_layer=1, clip=0.05, **options)
    method.epochs = 5
    return method


def make_synced() -> DINO:
    """With BatchNorm in encoder and head, as the trainer converts it where there is more than one rank.

    Not under AdamW: a bias before BatchNorm has no gradient but rounding, which it would blow up.
    """
    return sync_batchnorm(make_free_g(SGD, norm=True, use_bn=True))


# Loss and center


def test_loss_is_the_mean_over_ordered_pairs_of_a_global_view_and_another():
    method, s, t = make(), torch.randn(5 * 4, 9).double(), torch.randn(2 * 4, 9).double()
    method.center.copy_(torch.randn(1, 9))
    p = torch.softmax((t - method.center) / 0.04, 1).chunk(2)
    pairs = [(i, v) for i in range(2) for v in range(5) if i != v]
    losses = [-(p[i] * torch.log(torch.softmax(s.chunk(5)[v] / 0.1, 1))).sum(1).mean() for i, v in pairs]
    torch.testing.assert_close(method.distillation(s, t), sum(losses) / 8)


def test_lightly_has_the_same_loss_and_moves_the_center_at_once():
    """Lightly updates its center inside forward; ours waits for the optimizer step, so that parts share one center."""
    method, peer = make().float(), DINOLoss(9)
    for _ in range(3):
        s, t = torch.randn(4 * 8, 9), torch.randn(2 * 8, 9)
        loss = method.distillation(s, t)
        torch.testing.assert_close(method.center, peer.center[0])
        torch.testing.assert_close(loss, peer([*t.chunk(2)], [*s.chunk(4)], epoch=50))
        assert not torch.equal(method.center, peer.center[0])
        method.after_step()
        torch.testing.assert_close(method.center, peer.center[0])


def test_lightly_warms_the_teacher_by_epoch_as_ours():
    method = make(teacher_temperature=0.07, warmup_teacher_epochs=30)
    peer = DINOLoss(9, teacher_temp=0.07, warmup_teacher_temp_epochs=30)
    method.steps, method.epochs = 300, 100
    for method.step in range(0, 90):
        assert method.temperature == pytest.approx(float(peer.teacher_temp_schedule[method.step // 3]), rel=1e-5)
    method.step = 90
    assert method.temperature == 0.07


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_compared_in_float32(dtype):
    method, s, t = make().float(), torch.randn(8, 9).to(dtype), torch.randn(4, 9).to(dtype)
    loss = method.distillation(s, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, method.distillation(s.float(), t.float()))


def test_head_keeps_scores_in_float32_under_autocast():
    head = DINOHead(12, 10, 5, 9, use_bn=True, norm_last_layer=True)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(torch.randn(4, 12))
    assert scores.dtype == torch.float32
    assert scores.abs().max() <= 1 + 1e-6  # cosines, as long as g is one


def test_loss_at_chance_is_the_loss_of_a_student_without_opinion():
    method, t = make(), torch.randn(8, 9).double()
    loss = method.distillation(torch.zeros(16, 9).double(), t)
    assert loss.item() == pytest.approx(method.loss_at_chance()) == pytest.approx(math.log(9))


# Teacher


def test_backbone_is_the_teachers_and_receives_no_gradient():
    method, (batch,) = make(), random_batches(1, 8, CROPS)
    assert method.backbone is method.target.copies[0]
    method.loss(batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())


def test_teacher_sees_the_first_two_views_only():
    method, (batch,), seen = make(), random_batches(1, 8, CROPS), []
    method.target.copies[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    method.loss(batch)
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat(batch.views[:2]))


def test_teacher_follows_after_the_step_with_a_momentum_that_grows_to_one():
    method = make(momentum=0.9)
    method.loss(random_batches(1, 8, CROPS)[0])
    with torch.no_grad():
        for p in [*method.encoder.parameters(), *method.projector.parameters()]:
            p.add_(1.0)
    before = [p.clone() for p in method.target.parameters()]
    method.steps, method.step = 10, 5
    method.after_step()
    momentum = 1 - (1 - 0.9) * (1 + math.cos(math.pi * 0.5)) / 2
    for old, new in zip(before, method.target.parameters(), strict=True):
        torch.testing.assert_close(new - old, torch.full_like(old, 1 - momentum))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}),
        ("resnet18", {"zero_init_last": False}),
    ],
)
def test_stochastic_depth_is_the_students_alone(name, options):
    method = DINO(Encoder(name, options=options | {"drop_path_rate": 0.5}), hidden=10, bottleneck=5, out_dim=9).train()
    x = torch.randn(4, 3, 32, 32)
    assert any(isinstance(m, DropPath) and m.drop_prob for m in method.encoder.modules())
    assert not torch.equal(method.encoder(x), method.encoder(x))
    assert torch.equal(method.backbone(x), method.backbone(x))
    assert method.backbone.training  # its BatchNorm, where there is one, uses the batch


def test_vit_takes_small_crops_and_trains_one_step():
    options = {"img_size": 32, "patch_size": 8, "depth": 1, "dynamic_img_size": True}
    method = DINO(Encoder("vit_tiny_patch16_224", options=options), ADAMW, hidden=10, bottleneck=5, out_dim=9)
    views = [torch.randn(2, 3, size, size) for size in (32, 32, 16, 16)]
    method.loss(Batch(views, torch.arange(2), torch.full((2,), -1))).backward()
    assert method.encoder.net.pos_embed.grad.abs().sum() > 0


# Gradients


def test_each_parameter_is_clipped_by_its_own_norm():
    method = make(clip=0.5)
    parameters = [p for p in method.parameters() if p.requires_grad]
    for i, p in enumerate(parameters):
        p.grad = torch.full_like(p, i / 10)
    before = [p.grad.clone() for p in parameters]
    method.before_step()
    assert any(g.norm() > 0.5 for g in before)
    assert any(g.norm() < 0.5 for g in before)
    for p, g in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad, g * min(1.0, 0.5 / (g.norm().item() + 1e-6)))


def test_no_clipping_leaves_gradients_alone():
    method = make(clip=0)
    for p in method.parameters():
        p.grad = torch.full_like(p, 10.0)
    method.before_step()
    assert all((p.grad == 10).all() for p in method.parameters())


@pytest.mark.parametrize("optim", [SGD, ADAMW, Optim(name="lars", lr=1.0)])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_last_layer_stands_still_while_frozen_under_any_optimizer(optim, norm_last_layer):
    method = make(optim, freeze_last_layer=2, norm_last_layer=norm_last_layer)
    optimizer = optim.build(method.parameter_groups())
    method.steps, method.epochs = 8, 4
    last = method.projector.last_layer
    start, moved = [p.clone() for p in last.parameters()], []
    for method.step, batch in enumerate(random_batches(8, 8, CROPS)):
        optimizer.zero_grad()
        method.loss(batch).backward()
        method.before_step()
        optimizer.step()
        with torch.no_grad():
            method.after_step()
        moved.append([not torch.equal(p, old) for p, old in zip(last.parameters(), start, strict=True)])
    assert moved == [[False, False]] * 4 + [[not norm_last_layer, True]] * 4


def test_biases_and_norms_are_not_decayed_and_the_last_layers_norm_is():
    method = make(norm_last_layer=False)
    spared = {id(p) for group in method.parameter_groups() if not group["decay"] for p in group["params"]}
    names = {name for name, p in method.named_parameters() if id(p) in spared}
    assert names == {f"projector.mlp.{i}.bias" for i in (0, 2, 4)}


def test_every_trained_parameter_is_in_one_group():
    method = make(norm_last_layer=False, norm=True, use_bn=True)
    grouped = [id(p) for group in method.parameter_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters() if p.requires_grad)


# Ranks and parts


def test_two_ranks_equal_one():
    batches = random_batches(5, 8, CROPS)
    alone = train_alone(make_synced, batches)
    first, second = train_on_ranks(2, make_synced, batches)
    assert_same(alone, first)
    assert_same(alone, second)
    assert torch.equal(first["state"]["center"], second["state"]["center"])


def test_accumulating_two_halves_equals_one_batch():
    batches = random_batches(5, 8, CROPS)
    assert_same(train_alone(make_free_g, batches), train_alone(make_free_g, batches, accumulate=2))


# Mistakes and sizes


def test_one_view_is_refused():
    with pytest.raises(UserError, match="DINO compares views of an image but the configured views give 1"):
        make().loss(random_batches(1, 8, [(12,)])[0])


def test_head_has_the_papers_number_of_parameters_and_initial_values():
    head = DINOHead(384, 2048, 256, 65536, use_bn=False, norm_last_layer=True)
    assert sum(p.numel() for p in head.mlp.parameters()) == 5_509_376
    assert head.last_layer["weight_v"].numel() == 16_777_216
    assert not head.last_layer["weight_g"].requires_grad
    assert (head.last_layer["weight_g"] == 1).all()
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert not layer.bias.any()
    assert head.last_layer["weight_v"].abs().max() <= 1 / 16  # torch's own for 256 inputs


def test_recipe_builds_a_vit_at_the_papers_scale_and_a_resnet_elsewhere():
    paper, demo = (composed(["method=dino", f"scale={scale}"]) for scale in ("imagenet", "demo"))
    assert paper.encoder.name == "vit_small_patch16_224"
    assert paper.encoder.options.drop_path_rate == 0.1
    assert demo.encoder.name.startswith("resnet")
    assert not demo.encoder.options.drop_path_rate
    assert built(demo.optim, "optim", Optim).name == "adamw"
