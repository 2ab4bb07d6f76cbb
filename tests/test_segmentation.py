"""Segmentation: the loss counts pixels, inference returns to the image's size, scores are those of a slow count."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from boxed import rectangles, write_coco
from conftest import on_ranks
from runs import trainer
from sslzoo import dist
from sslzoo.blocks import Encoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.data.box_module import BoxBatch, Boxes
from sslzoo.data.boxes import load_boxes
from sslzoo.data.map_module import map_example
from sslzoo.downstream.segmentation import (
    Segmentation,
    class_map,
    looked,
    pixel_cross_entropy,
    predict,
    probabilities,
    score,
)
from sslzoo.downstream.segmenters import build
from sslzoo.optim import Optim


def segmentation(model: str = "fcn", side: int | None = None, **options) -> Segmentation:
    torch.manual_seed(0)
    net = build(model, Encoder("resnet10t", width=0.125), 3, [0.5] * 3, [0.25] * 3, channels=8, repeats=1)
    return Segmentation(net, side=side, **options)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Pictures of a red and a blue rectangle, 12 to learn from and 5 held out."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, rectangles(root, "train", 12, 0), rectangles(root, "val", 5, 1))
    return load_boxes("coco", root, masks=True)


# The loss


def test_the_loss_is_the_mean_over_pixels_that_are_not_ignored():
    scores = torch.randn(2, 4, 5, 6).double()
    truth = torch.randint(0, 4, (2, 5, 6)).to(torch.uint8)
    truth[0, :3] = truth[1, 2, 1] = 255
    total, count = 0.0, 0
    for b in range(2):
        for i in range(5):
            for j in range(6):
                if (k := int(truth[b, i, j])) != 255:
                    total -= math.log(math.exp(scores[b, k, i, j]) / sum(math.exp(s) for s in scores[b, :, i, j]))
                    count += 1
    assert count == 60 - 19
    assert float(pixel_cross_entropy(scores, truth)) == pytest.approx(total / count, rel=1e-12)
    assert pixel_cross_entropy(scores.bfloat16(), truth).dtype == torch.float32


def batch(size: int = 64, ignored: bool = False) -> BoxBatch:
    """Four images; the first two of them with fewer pixels that count, or none of all four with any."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 3, size, size), generator=generator, dtype=torch.uint8)
    truth = torch.randint(0, 3, (4, size, size), generator=generator).to(torch.uint8)
    truth[:2, : size - 9] = 255
    if ignored:
        truth[:] = 255
    return BoxBatch(list(images), [{"class_map": each} for each in truth], torch.arange(4))


@pytest.mark.parametrize("model", ["fcn", "deeplabv3"])
def test_a_batch_whose_pixels_are_all_ignored_costs_nothing_and_moves_nothing(model):
    learner = segmentation(model)
    loss = learner.loss(batch(ignored=True))
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in learner.parameters())


def test_gradients_are_clipped_where_that_is_asked_for():
    for clip in (None, 0.01):
        learner = segmentation(clip=clip)
        learner.loss(batch()).backward()
        learner.before_step()
        norm = torch.stack([p.grad.norm() for p in learner.parameters()]).norm()
        assert norm > 0.1 if clip is None else norm <= 0.0101


def step(rank: int, model: str, sets) -> dict:
    """A training step on this rank's share of the batch, in float64, and what is seen in eval mode afterwards."""
    learner = segmentation(model, side=48).double()
    learner.segmenter = (
        sync_batchnorm(learner.segmenter, torch.device("cpu")) if dist.world() > 1 else learner.segmenter
    )
    whole = batch()
    share = slice(rank * 4 // dist.world(), (rank + 1) * 4 // dist.world())
    mine = BoxBatch(*(part[share] for part in whole))
    torch.manual_seed(5)
    loss = learner.loss(mine)
    loss.backward()
    grads = {name: dist.all_mean(p.grad) for name, p in learner.named_parameters() if p.grad is not None}
    state = {name: value for name, value in learner.state_dict().items() if "running" in name}
    return {
        "loss": float(dist.all_mean(loss)),
        "grads": grads,
        "state": state,
        "maps": predict(learner, sets[1]),
        "scores": looked(learner, sets[1]),
    }


@pytest.mark.parametrize("model", ["fcn_moco", pytest.param("nas_fpn", marks=pytest.mark.slow)])
def test_two_ranks_learn_and_see_what_one_does_though_their_pixels_that_count_differ(model, sets):
    alone, *ranks = step(0, model, sets), *on_ranks(2, step, model, sets)
    for found in ranks:
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-9)
        for what in ("grads", "state"):
            assert found[what].keys() == alone[what].keys()
            for name, value in alone[what].items():
                torch.testing.assert_close(found[what][name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: n + m)
        assert all(torch.equal(a, b) for a, b in zip(found["maps"], alone["maps"], strict=True))
        assert found["scores"] == alone["scores"]


# Inference


def test_probabilities_are_of_the_images_own_pixels_and_the_mean_over_scales_and_mirrors():
    learner = segmentation("fpn").eval()
    picture = torch.randint(0, 256, (3, 50, 61), dtype=torch.uint8)
    found = probabilities(learner, picture, scales=(0.5, 1.0, 1.5), flip=True)
    total = torch.zeros(3, 50, 61)
    for height, width in ((25, 30), (50, 61), (75, 92)):
        for mirror in (False, True):
            x = picture[None].float() / 255
            x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
            scores = learner.segmenter(x.flip(3)).flip(3) if mirror else learner.segmenter(x)
            total += F.interpolate(scores, (50, 61), mode="bilinear")[0].softmax(0) / 6
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(found.sum(0), torch.ones(50, 61))
    assert not found.requires_grad


def test_an_image_is_looked_at_as_large_as_it_was_in_training():
    learner = segmentation("fpn", side=96).eval()
    picture = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
    x = F.interpolate(picture[None].float() / 255, (80, 96), mode="bilinear", antialias=True)
    wanted = F.interpolate(learner.segmenter(x), (40, 48), mode="bilinear")[0].softmax(0)
    torch.testing.assert_close(probabilities(learner, picture), wanted)
    twice = F.interpolate(picture[None].float() / 255, (160, 192), mode="bilinear", antialias=True)
    wanted = F.interpolate(learner.segmenter(twice), (40, 48), mode="bilinear")[0].softmax(0)
    torch.testing.assert_close(probabilities(learner, picture, scales=(2.0,)), wanted)


def test_a_network_in_training_mode_is_no_judge():
    with pytest.raises(ValueError, match="eval"):
        probabilities(segmentation(), torch.zeros(3, 40, 40, dtype=torch.uint8))


def test_pixels_that_are_not_sure_enough_become_255():
    probability = torch.tensor([[[0.2, 0.5]], [[0.49, 0.3]], [[0.31, 0.2]]])  # (3, 1, 2)
    assert class_map(probability).tolist() == [[1, 0]]
    assert class_map(probability, least=0.5).tolist() == [[255, 0]]
    assert class_map(probability, least=0.5).dtype == torch.uint8


def test_what_is_seen_belongs_to_its_image_and_leaves_the_mode_as_it_was(sets):
    _, val = sets
    learner = segmentation("fpn", side=64)
    learner.train()
    statistics = learner.segmenter.encoder.net.bn1.running_mean.clone()
    found = predict(learner, val, least=0.4)
    assert learner.training
    assert torch.equal(learner.segmenter.encoder.net.bn1.running_mean, statistics)
    learner.eval()
    for i, each in enumerate(found):
        picture = torch.from_numpy(val.picture(i).copy()).permute(2, 0, 1)
        assert each.shape == tuple(val.sizes[i])
        assert torch.equal(each, class_map(probabilities(learner, picture), least=0.4))


# Scores


class Drawn:
    """Class maps without pictures."""

    def __init__(self, maps, classes):
        self.maps, self.map_classes = maps, [f"class {k}" for k in range(classes)]

    def __len__(self):
        return len(self.maps)

    def class_map(self, i):
        return self.maps[i]


def slow_iou(truth, found, classes):
    """By sets of pixels."""
    ious = {}
    for k in range(classes):
        true, said = set(), set()
        for i, (t, f) in enumerate(zip(truth, found, strict=True)):
            for place in np.ndindex(*t.shape):
                if t[place] != 255:
                    true |= {(i, *place)} if t[place] == k else set()
                    said |= {(i, *place)} if f[place] == k else set()
        ious[k] = len(true & said) / len(true | said) if true | said else None
    return ious


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_a_slow_count(seed):
    rng = np.random.default_rng(seed)
    classes, shapes = 6, ((7, 9), (5, 4), (8, 8))
    truth = [rng.choice([0, 1, 2, 4, 255], shape) for shape in shapes]  # class 3 is found only, class 5 never
    found = [np.where(rng.random(t.shape) < 0.5, t, rng.choice([0, 1, 3, 255], t.shape)) for t in truth]
    scores = score(Drawn([torch.from_numpy(t) for t in truth], classes), [torch.from_numpy(f) for f in found])
    wanted = slow_iou(truth, found, classes)
    assert wanted[5] is None
    assert wanted[3] == 0
    assert scores["iou"] == {f"class {k}": pytest.approx(v) if v is not None else None for k, v in wanted.items()}
    there = [value for value in wanted.values() if value is not None]
    assert scores["miou"] == pytest.approx(sum(there) / len(there))
    asked = np.concatenate([t[t != 255] for t in truth])
    answers = np.concatenate([f[t != 255] for t, f in zip(truth, found, strict=True)])
    assert scores["pixel_accuracy"] == pytest.approx((asked == answers).mean())


def test_perfect_maps_score_one_and_truth_without_pixels_has_no_score(sets):
    _, val = sets
    scores = score(val, [val.class_map(i).to(torch.uint8) for i in range(len(val))])
    assert scores["miou"] == scores["pixel_accuracy"] == 1.0
    assert scores["iou"] == {"background": 1.0, "red": 1.0, "blue": 1.0}
    nothing = score(Drawn([torch.full((3, 3), 255)], 2), [torch.zeros(3, 3)])
    assert nothing == {"miou": None, "pixel_accuracy": None, "iou": {"class 0": None, "class 1": None}}


def test_scores_need_a_map_for_every_image(sets):
    with pytest.raises(ValueError):
        score(sets[1], [torch.zeros(4, 4)])


@pytest.mark.slow
def test_a_segmenter_learns_red_and_blue(sets):
    train, val = sets
    learner = segmentation("fpn", side=64, optim=Optim(name="adamw", lr=5e-3, lr_per=None))
    before = score(val, predict(learner, val))["miou"]
    batches = Boxes(train, val, map_example(train, "s1", 64), 4)
    trainer(max_epochs=25).fit(learner, datamodule=batches)
    after = score(val, predict(learner, val))
    assert after["miou"] > max(0.7, before + 0.2)
    assert set(after["iou"]) == {"background", "red", "blue"}
