"""A teacher that follows its student: whom it equals, what it sees, what its boxes teach, and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from boxed import rectangles, same, write_coco
from conftest import on_ranks
from runs import checkpoint_of, killed_before
from selftraining import taught_steps
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.data.box_module import AUGMENTS, BoxBatch, BoxLoader, twin_example
from sslzoo.data.box_views import STRENGTHS, augmented, mirrored, twins
from sslzoo.data.boxes import load_boxes
from sslzoo.data.mixed import MixedBatch
from sslzoo.data.pseudo_labels import PseudoLabels
from sslzoo.downstream.detection import Detection
from sslzoo.downstream.detectors import build, losses_of
from sslzoo.downstream.taught import TaughtDetection
from sslzoo.errors import UserError
from sslzoo.moving_teacher import Moving, TaughtStudent
from sslzoo.optim import Optim
from sslzoo.report.csv_log import read_rows
from sslzoo.selftrain import LossBalance
from sslzoo.tasks.selftrain_boxes import load_learner
from sslzoo.views.draw import key

MODELS = ["retinanet", "fcos", "faster_rcnn_fpn", "faster_rcnn_c4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in COCO's layout: 12 training and 6 held-out pictures."""
    root = tmp_path_factory.mktemp("coco")
    return write_coco(root, rectangles(root, "train", 12, 0), rectangles(root, "val", 6, 1))


@pytest.fixture(scope="module")
def sets(root):
    return load_boxes("coco", root)


def detector(model: str = "retinanet", batchnorm: bool = True, **options) -> nn.Module:
    torch.manual_seed(0)
    if batchnorm:
        encoder = Encoder("resnet10t", width=0.125)
    else:
        encoder = Encoder("convnext_atto", options={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)})
    small = {"channels": 16, "convs": 1, "norm": "group", "rois": 8, "proposals": 10, "score": 0.0, "detections": 5}
    return build(model, encoder, 2, [0.5] * 3, [0.25] * 3, min_size=64, max_size=64, **{**small, **options})


def student(model: str = "retinanet", batchnorm: bool = True, **moving) -> TaughtDetection:
    learner = Detection(detector(model, batchnorm), Optim(lr=0.01, lr_per=None))
    settings = Moving(**{"burn_in": 0.0, "threshold": 0.0, **moving})
    module = TaughtDetection(learner, LossBalance(), settings)
    module.steps = 10
    return module


def pictures(images: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (images, 3, 64, 64), generator=generator, dtype=torch.uint8)


def batch_of(images: int = 4, seed: int = 0) -> MixedBatch:
    """Noise: images of people with a box each, and others in two views."""
    boxes = [{"boxes": torch.tensor([[4.0 * k, 4, 40 + k, 50]]), "labels": torch.tensor([1 + k % 2])}
             for k in range(images)]  # fmt: skip
    human, clean, distorted = (list(pictures(images, 3 * seed + k)) for k in range(3))
    index = torch.arange(images)
    pseudo = BoxBatch(distorted, [{"clean": image} for image in clean], index)
    return MixedBatch(BoxBatch(human, boxes, index), pseudo)


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def gives(module: TaughtStudent, monkeypatch, found: list[dict]) -> list:
    """Let the teacher's detector find ``found``; returns the images that it is asked about."""
    asked = []

    def forward(images):
        asked.extend(images)
        return found

    monkeypatch.setattr(module.teacher.average, "forward", forward)
    return asked


def found_in(boxes, scores, labels=None) -> dict:
    n = len(scores)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor([1] * n if labels is None else labels, dtype=torch.long),
    }


NOTHING = found_in([], [])


# Whom the teacher equals


def moved(module: TaughtStudent, step: int) -> None:
    """Other weights and other statistics, then what comes after a step of the optimizer."""
    module.step = step
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in module.learner.detector.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    module.learner.detector.backbone(torch.randn(4, 3, 64, 64, generator=generator))
    module.after_step()


def test_the_teacher_is_the_student_until_the_burn_in_ends_and_its_average_from_there():
    module = student(decay=0.7, burn_in=0.3)
    own, average = (part.state_dict() for part in (module.learner.detector, module.teacher.average.copies[0]))
    expected, statistics = {}, 0
    for step in range(7):
        moved(module, step)
        for name, value in own.items():
            wide = value.double() if value.is_floating_point() else value
            follows = step >= 3 and value.is_floating_point()
            expected[name] = 0.7 * expected[name] + 0.3 * wide if follows else wide.clone()
            exact = not follows
            torch.testing.assert_close(
                average[name].to(wide), expected[name], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6
            )
            statistics += follows and "running" in name
    assert statistics > 0
    assert any(not torch.equal(value, own[name]) for name, value in average.items() if "running_mean" in name)


@pytest.mark.parametrize("burn_in", [0.0, 0.07, 0.25, 0.29, 1 / 3, 0.57, 0.99])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_steps_of_the_burn_in_are_those_that_are_counted_as_such(burn_in, steps):
    module, burnt = student(burn_in=burn_in), 0
    module.steps = steps
    for step in range(steps):
        assert module.human_alone(step, steps) == burnt
        module.step = step
        burnt += module.burns_in
    assert module.human_alone(steps, steps) == burnt


def test_the_teacher_never_trains_and_is_nobodys_parameter():
    module = student()
    module.train()
    assert not any(part.training for part in module.teacher.modules())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    taught = {id(p) for group in module.parameter_groups() for p in group["params"]}
    assert taught == {id(p) for p in module.learner.parameters()}
    before = {name: value.clone() for name, value in module.teacher.average.state_dict().items()}
    module.loss(batch_of()).backward()
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.average.state_dict().items())
    assert all(p.grad is None for p in module.teacher.parameters())
    assert module.learner.detector.training


# What is learned from


def test_until_the_burn_in_ends_the_pseudo_half_has_no_influence():
    module, batch = student(burn_in=0.5), batch_of()
    module.step = 4
    alone = gradients(module.learner, module.learner.loss(batch.human))
    both = gradients(module.learner, module.loss(batch))
    assert all(torch.equal(grad, alone[name]) for name, grad in both.items())
    assert module.balance.means.tolist() == [0, 0]
    module.step = 5
    both = gradients(module.learner, module.loss(batch))
    assert any(not torch.equal(grad, alone[name]) for name, grad in both.items())
    assert module.balance.means.gt(0).all()


def test_the_teacher_is_asked_about_clean_views_and_its_sure_boxes_teach_the_distorted_ones(monkeypatch):
    module, batch = student(threshold=0.5), batch_of(2)
    large, other, thin = [2, 3, 40, 50], [10, 10, 30, 60], [5, 5, 6.9, 60]
    found = [found_in([large, other, thin], [0.9, 0.49, 0.8], [2, 1, 1]), found_in([other, large], [0.5, 0.1], [1, 2])]
    asked = gives(module, monkeypatch, found)
    loss = module.pseudo_loss(batch.pseudo)
    clean = [target["clean"] / 255 for target in batch.pseudo.targets]
    assert all(torch.equal(one, other) for one, other in zip(asked, clean, strict=True))
    targets = [found_in([large], [1], [2]), found_in([other], [1], [1])]
    expected = module.learner.loss(BoxBatch(batch.pseudo.images, targets, batch.pseudo.index))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.teacher.share == pytest.approx(1.0)


@pytest.mark.parametrize("model", MODELS)
def test_where_all_images_count_losses_are_the_detectors_own(model):
    net, batch = detector(model), batch_of().human
    images = [image / 255 for image in batch.images]
    torch.manual_seed(1)
    expected = net(images, batch.targets)
    torch.manual_seed(1)
    found = losses_of(net, images, batch.targets, range(4))
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", MODELS[:3])
def test_an_image_in_which_nothing_is_found_does_not_count(monkeypatch, model):
    module, batch = student(model, batchnorm=False), batch_of(3).pseudo
    sure = [found_in([[2, 3, 40, 50]], [0.9]), found_in([[10, 10, 30, 60]], [0.8], [2])]
    gives(module, monkeypatch, [sure[0], NOTHING, sure[1]])
    torch.manual_seed(1)
    loss = module.pseudo_loss(batch)
    two = BoxBatch(batch.images[::2], sure, batch.index[::2])
    torch.manual_seed(1)
    assert loss.item() == pytest.approx(module.learner.loss(two).item(), rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_where_nothing_is_found_the_loss_is_a_zero_that_reaches_every_parameter(monkeypatch, model):
    module, batch = student(model), batch_of(2)
    gives(module, monkeypatch, [NOTHING, NOTHING])
    loss = module.pseudo_loss(batch.pseudo)
    grads = gradients(module.learner, loss)
    assert loss.item() == 0
    assert grads.keys() == {name for name, p in module.learner.named_parameters() if p.requires_grad}
    assert not any(grad.any() for grad in grads.values())
    module.loss(batch)
    assert module.balance.means.tolist() == [0, 0]  # a step without pseudo-labels says nothing of their scale


# What both see


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_teacher_sees_the_geometry_of_the_strength_and_its_own_pixels(strength):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    plain = {"s2": "s1"}.get(strength, strength)
    distorted = 0
    for k in range(20):
        clean, other, _ = twins(image, strength, 48, key(0, 0, k))
        assert clean.shape == other.shape == (3, 48, 48)
        if STRENGTHS[plain].policy is None:  # the same draws without a policy
            assert torch.equal(clean, augmented(image, {"boxes": torch.zeros(0, 4)}, plain, 48, key(0, 0, k))[0])
        distorted += not torch.equal(clean, other)
    assert distorted == 0 if STRENGTHS[strength].policy is None else 4 <= distorted < 20


def inner(mask: torch.Tensor) -> torch.Tensor:
    """Places all of whose neighbours are in ``mask`` (H, W): beyond what sharpening reaches."""
    return -nn.functional.max_pool2d(-mask[None].float(), 3, 1, 1)[0] > 0


@pytest.mark.parametrize("strength", ["s2", "s3", "s4"])
def test_distortion_leaves_an_object_on_its_pixels(strength):
    colours = (90, 90, 90), (250, 30, 30)
    image = np.full((60, 60, 3), colours[0], np.uint8)
    image[20:40, 10:35] = colours[1]
    seen = 0
    for k in range(40):
        clean, other, _ = twins(image, strength, 48, key(0, 0, k))
        cut = (other == 128).all(0)
        areas = [inner((clean == torch.tensor(colour)[:, None, None]).all(0)) & ~cut for colour in colours]
        if all(area.any() for area in areas) and not torch.equal(clean, other):
            seen += 1
            background, thing = (other[:, area] for area in areas)
            for pixels in (background, thing):  # of one colour still: nothing has come in from elsewhere
                assert torch.equal(pixels, pixels[:, :1].expand_as(pixels))
            assert not torch.equal(background[:, 0], thing[:, 0])
    assert seen > 5


@pytest.mark.parametrize("augment", AUGMENTS)
def test_twins_are_a_function_of_seed_epoch_and_row_alone_and_need_no_boxes(sets, augment):
    train = sets[0].unlabelled()

    def batches(seed: int, workers: int) -> list[BoxBatch]:
        return list(BoxLoader(train, twin_example(train, augment, 48, seed), 4, seed, workers))

    first = batches(5, 3)
    assert same(first, batches(5, 1))
    assert not same(first, batches(6, 1))
    for batch in first:
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert target.keys() == {"clean"}
            assert target["clean"].shape == image.shape
            assert target["clean"].dtype == image.dtype == torch.uint8
    if augment == "flip":
        row = int(first[0].index[0])
        image, _ = mirrored(*train.read(row), key(5, 0, row))
        assert torch.equal(first[0].images[0], image)


# Ranks


def sighted_steps(module: TaughtStudent, batches: list[MixedBatch]) -> dict[str, torch.Tensor]:
    """Steps, the first of them the burn-in, in which nothing is found in images whose first pixel is black."""
    find = module.teacher.average.forward

    def forward(images):
        found = find(images)
        return [each if image[:, 0, 0].any() else NOTHING for image, each in zip(images, found, strict=True)]

    module.teacher.average.forward = forward
    return taught_steps(module, batches, lr=0.01)


def half(batch: MixedBatch, rank: int) -> MixedBatch:
    rows = slice(2 * rank, 2 * rank + 2)
    return MixedBatch(*(BoxBatch(part.images[rows], part.targets[rows], part.index[rows]) for part in batch))


def one_stage() -> TaughtStudent:
    """A student whose loss is the whole batch's, however it is spread."""
    return student(batchnorm=False, decay=0.5, burn_in=0.1)


def taught_on_rank(rank: int, batches: list[MixedBatch]) -> list[dict[str, torch.Tensor]]:
    two_stages = sync_batchnorm(student("faster_rcnn_c4", decay=0.5, burn_in=0.1))
    return [sighted_steps(module, [half(batch, rank) for batch in batches]) for module in (one_stage(), two_stages)]


def test_two_ranks_equal_one_though_one_of_them_finds_nothing():
    batches = [batch_of(4, seed) for seed in range(4)]
    for step, row in ((1, 1), (2, 2), (2, 3)):  # in step 2 nothing is left to the second rank
        batches[step].pseudo.targets[row]["clean"][:, 0, 0] = 0
    alone, start = sighted_steps(one_stage(), batches), one_stage().state_dict()
    ranks = on_ranks(2, taught_on_rank, batches)
    for one, other in zip(*ranks, strict=True):  # of either kind of detector; BatchNorm of a second stage as well
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    one = ranks[0][0]
    for name, value in alone.items():
        if name == "teacher.found":  # means of a rank, and of the whole
            one[name] = 2 * one[name]
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(value, start[name]) for name, value in alone.items() if name.startswith("teacher.av"))
    assert alone["balance.means"].gt(0).all()


# Whole runs


@pytest.fixture(scope="module")
def labels(tmp_path_factory, root):
    """A file of pseudo-labels without a single box."""
    train, _ = load_boxes("coco", root)
    return PseudoLabels(train.unlabelled(), np.zeros(0), 0.5).write(tmp_path_factory.mktemp("pseudo") / "labels.json")


def command(root, labels, *more: str) -> list[str]:
    return [
        "task=detect", "backbone=random", "data=coco", f"data.root={root}", "data.batch_size=4", "data.workers=1",
        "encoder.width=0.125", "task.min_size=64", "task.max_size=64", "task.channels=16", "task.convs=1",
        "task.augment=s2", "trainer.max_epochs=3", "task.every_epochs=3", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "monitor.log_every=1", "task.score=0.0", "task.detections=5",
        f"task.pseudo={labels}", *more,
    ]  # fmt: skip


TEACHER = "task.teacher={decay: 0.5, burn_in: 0.4, threshold: 0.0}"


@pytest.mark.slow
def test_a_run_killed_and_resumed_equals_an_unbroken_one_and_tells_of_its_teacher(tmp_path, root, labels):
    words = [*command(root, labels, TEACHER), "checkpoint.steps=1"]
    summary = run([*words, f"run_dir={tmp_path / 'whole'}"])
    with killed_before(5):
        run([*words, f"run_dir={tmp_path / 'broken'}"])
    resumed = run([f"resume={tmp_path / 'broken'}"])
    one, other = (checkpoint_of(tmp_path / name)["state_dict"] for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert one["balance.means"].gt(0).all()
    student = load_learner(tmp_path / "whole", classes=2).state_dict()  # from which the next iteration labels
    assert all(torch.equal(value, one[f"learner.{name}"]) for name, value in student.items())
    for name in ("loss", "map", "teacher", "images_seen"):
        assert resumed[name] == summary[name], name
    assert summary["images_seen"] == 9 * 8 - 4 * 4  # in the first four steps the pseudo-labelled half does not count
    told = summary["teacher"]
    assert {name: told[name] for name in ("decay", "burn_in", "threshold")} == {
        "decay": 0.5, "burn_in": 0.4, "threshold": 0.0}  # fmt: skip
    assert 0 < told["pseudo_boxes"] <= 5
    for name in ("whole", "broken"):
        rows = [row for row in read_rows(tmp_path / name / "metrics.csv") if "pseudo_boxes" in row]
        assert [row["step"] for row in rows] == [6, 9]  # 3.6 steps are burn-in
        assert rows[-1]["pseudo_boxes"] == told["pseudo_boxes"]
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["teacher"] == told


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.teacher={decay: 1.0}"], "a moving teacher's decay=1.0 is no number from 0 to below 1"),
        (["task.teacher={decay: high}"], "a moving teacher's decay=high is no number"),
        (["task.teacher={burn_in: -0.1}"], "a moving teacher's burn_in=-0.1 is no number from 0 to below 1"),
        (["task.teacher={burn_in: true}"], "a moving teacher's burn_in=True is no number"),
        (["task.teacher={threshold: 1.5}"], "a moving teacher's threshold=1.5 is no score from 0 to 1"),
        (["task.teacher={threshold: match-density}"], "needs the scores of a whole set, but a moving teacher labels"),
        (
            ["task.teacher={momentum: 0.9}"],
            "is neither null nor settings of a moving teacher, decay, burn_in, threshold",
        ),
        (["task.teacher=true"], "teacher=True is neither null nor settings of a moving teacher, decay, burn_in, thr"),
        ([TEACHER, "task.pseudo=null"], "has nothing to label; set task.pseudo, which names images"),
        ([TEACHER, "task.augment=s9"], "task.augment=s9 is none of"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_written(tmp_path, root, labels, capsys, words, message):
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in command(root, labels) if word.partition("=")[0] not in keys]
    assert main([*kept, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_settings_have_defaults_and_are_checked():
    assert Moving() == Moving(0.9996, 0.25, 0.5)
    with pytest.raises(UserError, match=r"a moving teacher's threshold=-1 is no score"):
        Moving(threshold=-1)
