"""Joint training: two losses at once, whose images BatchNorm remembers, that it goes on, and what is refused."""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from boxed import rectangles, write_coco
from conftest import Tiny, close, on_ranks
from runs import checkpoint_of, image_set, images, killed_before
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.checkpoints import save_backbone
from sslzoo.config import composed, config_hash, differences, plain
from sslzoo.data.boxes import load_boxes
from sslzoo.data.mixed import JointBatch, MixedBatch
from sslzoo.data.pseudo_labels import PseudoLabels
from sslzoo.dist import all_mean, mine
from sslzoo.errors import UserError
from sslzoo.joint import Joint
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim
from sslzoo.selftrain import LossBalance, Student
from sslzoo.tasks.detect import build_detector
from sslzoo.tasks.joint import class_images, settings_of
from sslzoo.tasks.selftrain_boxes import load_learner
from sslzoo.tasks.training import with_task_views
from sslzoo.views import parse


class Points(NamedTuple):
    """What ``Squares`` learns from."""

    x: torch.Tensor
    index: torch.Tensor


class Squares(Method):
    """Pulls features towards one, by a scale of its own."""

    sync_batchnorm = True
    settings = "task.optim"

    def __init__(self, norm: bool = True):
        super().__init__(Tiny(norm=norm), Optim(lr=0.1, lr_per=None, exclude="bias_and_norm"))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.calls: list[str] = []

    def loss(self, batch: Points) -> torch.Tensor:
        return (self.scale * self.encoder(batch.x) - 1).square().mean()

    def before_step(self) -> None:
        self.calls.append("before")

    def after_step(self) -> None:
        self.calls.append(f"after {self.step} of {self.steps} in {self.epochs}")


def points(count: int = 8, shift: float = 0.0) -> Points:
    return Points(torch.randn(count, 12, dtype=torch.double) + shift, torch.arange(count))


def batch_of(first, count: int = 6) -> JointBatch:
    """Its classified images are another domain: far from the first."""
    labels = torch.arange(count) % 3
    x = 2 * torch.randn(count, 12, dtype=torch.double) - 3
    return JointBatch(first, Batch([x], torch.arange(count), labels))


def joint(norm: bool = True, **options) -> Joint:
    module = Joint(Squares(norm), classes=3, **options).double()
    nn.init.normal_(module.classifier.weight)
    return module


def features(x, weight, gamma, beta):
    """Linear, BatchNorm by the batch, ReLU."""
    z = x @ weight.T
    z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() * gamma + beta
    return z.clamp(min=0)


# Two losses


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_loss_and_gradients_are_those_of_both_written_out(weight):
    module, batch = joint(weight=weight), batch_of(points())
    module.loss(batch).backward()
    names = ["encoder.0.weight", "encoder.1.weight", "encoder.1.bias", "learner.scale", "classifier.weight"]
    found = dict(module.named_parameters(remove_duplicate=False))
    own = [found[name].detach().clone().requires_grad_() for name in [*names, "classifier.bias"]]
    (*encoder, scale, w, b), (x,), label = own, batch.classified.views, batch.classified.label
    scores = features(x, *encoder) @ w.T + b
    first = (scale * features(batch.first.x, *encoder) - 1).square().mean()
    second = (scores.exp().sum(1).log() - scores[torch.arange(6), label]).mean()
    (first + weight * second).backward()
    close(module.loss(batch).detach(), (first + weight * second).detach())
    close(module.class_loss, second.detach())
    for name, p in zip([*names, "classifier.bias"], own, strict=True):
        close(found[name].grad, p.grad, rtol=1e-8)


def test_running_statistics_are_those_of_the_learners_images_alone():
    module, batches = joint(), [batch_of(points(shift=k)) for k in range(3)]
    alone = copy.deepcopy(module.learner)
    for batch in batches:
        module.loss(batch)
        alone.loss(batch.first)
    for name, value in alone.encoder[1].named_buffers():
        assert torch.equal(value, module.encoder[1].get_buffer(name)), name
    assert alone.encoder[1].num_batches_tracked == 3


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_weight_of_zero_leaves_the_learners_gradients_as_they_are(clip):
    module, batch = joint(weight=0.0, clip=clip), batch_of(points())
    alone = copy.deepcopy(module.learner)
    for each, given in ((module, batch), (alone, batch.first)):
        each.loss(given).backward()
        each.before_step()
    if clip is not None:
        nn.utils.clip_grad_norm_(alone.parameters(), clip)
    for one, other in zip(alone.parameters(), module.learner.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert all(not p.grad.any() for p in module.classifier.parameters())  # there, so that no rank waits


def test_one_norm_clips_all_gradients_the_classifiers_too():
    module, batch = joint(clip=0.01), batch_of(points())
    module.loss(batch).backward()
    before = [p.grad.clone() for p in module.parameters()]
    norm = torch.stack([gradient.norm() for gradient in before]).norm()
    module.before_step()
    assert norm > 0.1
    for p, gradient in zip(module.parameters(), before, strict=True):
        close(p.grad, gradient * 0.01 / norm, rtol=1e-4)


def test_what_the_learner_does_around_a_step_is_done():
    module = joint()
    module.step, module.steps, module.epochs = 3, 9, 2
    module.loss(batch_of(points()))
    module.before_step()
    module.after_step()
    assert module.learner.calls == ["before", "after 3 of 9 in 2"]
    assert (module.sync_batchnorm, module.settings, module.optim) == (True, "task.optim", module.learner.optim)
    groups = module.parameter_groups()
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted({id(p) for p in module.parameters()})
    assert [group["decay"] for group in groups if id(module.classifier.weight) in map(id, group["params"])] == [True]
    assert [group["decay"] for group in groups if id(module.classifier.bias) in map(id, group["params"])] == [False]


def test_a_student_inside_is_taught_by_people_by_its_teacher_and_by_classes():
    learner = Squares()
    module = Joint(Student(learner, LossBalance(alpha=0.5)), classes=3, weight=0.3).double()
    batch = batch_of(MixedBatch(points(), points(shift=1)))
    alone = copy.deepcopy(module.learner)
    loss = module.loss(batch)
    close(loss.detach(), (alone.loss(batch.first) + 0.3 * module.class_loss).detach())
    assert torch.equal(alone.balance.means, module.learner.balance.means)
    assert torch.equal(alone.encoder[1].running_mean, module.encoder[1].running_mean)
    assert len(batch.index) == 16
    module.before_step()
    assert learner.calls == ["before"]


# Ranks


class Stepped(nn.Module):
    """What Lightning hands to DDP."""

    def __init__(self, module: Joint):
        super().__init__()
        self.module = module

    def forward(self, batch: JointBatch) -> torch.Tensor:
        return self.module.loss(batch)


def two_steps(module: Joint, batches: list[JointBatch], wrap) -> dict:
    net = wrap(Stepped(module))
    for batch in batches:  # in the second one DDP complains if a gradient of the first never came
        module.zero_grad()
        net(batch).backward()
    return {
        "gradients": [p.grad for p in module.parameters()],
        "statistics": [value for name, value in module.encoder.named_buffers()],
        "class loss": all_mean(module.class_loss),
    }


def on_rank(rank: int, module: Joint, batches: list[JointBatch]) -> dict:
    def part(batch: JointBatch) -> JointBatch:
        classified = batch.classified
        (x,) = map(mine, classified.views)
        return JointBatch(Points(*map(mine, batch.first)), Batch([x], mine(classified.index), mine(classified.label)))

    module = copy.deepcopy(module)  # what comes to a process lies in memory that all share
    return two_steps(sync_batchnorm(module), [part(batch) for batch in batches], DistributedDataParallel)


def test_two_ranks_of_half_the_images_equal_one():
    module, batches = joint(weight=0.5), [batch_of(points()), batch_of(points(shift=1))]
    ranks = on_ranks(2, on_rank, module, batches)
    expected = two_steps(module, batches, lambda net: net)
    for found in ranks:
        close(found.pop("class loss"), expected["class loss"])
        for name, values in found.items():
            for one, other in zip(values, expected[name], strict=True):
                close(one, other, rtol=1e-8)


# Whole runs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """12 training and 6 held-out pictures in COCO's layout; pseudo-labels are the true ones; a tree without labels."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, rectangles(root, "train", 12, 0), rectangles(root, "val", 6, 1))
    train, _ = load_boxes("coco", root)
    PseudoLabels(train, np.ones(len(train.labels)), 0.5).write(root / "labels.json")
    (root / "flat").mkdir()
    Image.new("RGB", (32, 32)).save(root / "flat" / "a.png")
    return root


def command(root, *more: str) -> list[str]:
    return [
        "task=detect", "backbone=random", "data=coco", f"data.root={root}", "data.batch_size=4", "data.workers=1",
        "encoder.width=0.125", "task.min_size=64", "task.max_size=64", "task.channels=16", "task.convs=1",
        "task.score=0.0", "trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.precision=32-true",
        "monitor.log_every=1", *more,
    ]  # fmt: skip


JOINT = ["task.joint={data: photos, batch_size: 8, size: 24, weight: 0.5}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    run_dir = tmp_path_factory.mktemp("runs") / "joint"
    return run_dir, run(command(root, *JOINT, f"run_dir={run_dir}"))


def test_a_run_starts_as_without_classes_and_counts_their_images_apart(tmp_path, root, finished):
    run_dir, summary = finished
    alone = run(command(root, f"run_dir={tmp_path / 'alone'}", "trainer.max_steps=1"))
    assert summary["start"] == alone["start"]
    assert alone["joint"] is None
    assert (summary["steps"], summary["epochs"], summary["images_seen"]) == (6, 2, 24)
    loss = checkpoint_of(run_dir)["state_dict"]["class_loss"].item()
    settings = {"data": "photos", "root": None, "batch_size": 8, "size": 24, "weight": 0.5}
    assert summary["joint"] == {**settings, "images_seen": 48, "classes": 10, "loss": loss}
    assert 0.5 < loss < 5
    assert checkpoint_of(run_dir)["callbacks"]["Metrics"]["images"] == 24


def test_a_detector_taught_jointly_can_label(finished):
    run_dir, _ = finished
    weights = checkpoint_of(run_dir)["state_dict"]
    found = load_learner(run_dir, classes=2).state_dict()
    assert all(torch.equal(value, weights[f"learner.{name}"]) for name, value in found.items())
    assert not torch.equal(found["encoder.net.conv1.weight"], build(run_dir).encoder.net.conv1.weight)


def build(run_dir) -> nn.Module:
    """The backbone of a run at its start."""
    config = OmegaConf.load(run_dir / "config.yaml")
    torch.manual_seed(config.seed)
    return build_detector(config, Encoder(**plain(config.encoder)), 2).backbone


def broken(run_dir, words: list[str], step: int) -> dict:
    """A run that was killed at ``step`` and resumed."""
    with killed_before(step):
        run([*words, f"run_dir={run_dir}", "checkpoint.steps=1"])
    return run([f"resume={run_dir}"])


def assert_same(one, other, summaries) -> None:
    weights, others = (checkpoint_of(run_dir)["state_dict"] for run_dir in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    for key in ("loss", "joint", "map", "images_seen", "start", "config_hash"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5])
def test_a_run_killed_and_resumed_equals_an_unbroken_one(tmp_path, monkeypatch, root, finished, step):
    run_dir, summary = finished
    resumed = broken(tmp_path / "broken", command(root, *JOINT), step)
    assert_same(run_dir, tmp_path / "broken", (summary, resumed))


@pytest.mark.slow
def test_a_student_killed_and_resumed_equals_an_unbroken_one_and_can_label(tmp_path, monkeypatch, root):
    words = command(root, *JOINT, f"task.pseudo={root / 'labels.json'}")
    summary = run([*words, f"run_dir={tmp_path / 'whole'}"])
    resumed = broken(tmp_path / "broken", words, 4)
    assert_same(tmp_path / "whole", tmp_path / "broken", (summary, resumed))
    assert (summary["images_seen"], summary["joint"]["images_seen"]) == (48, 48)
    weights = checkpoint_of(tmp_path / "whole")["state_dict"]
    found = load_learner(tmp_path / "whole", classes=2).state_dict()
    assert all(torch.equal(value, weights[f"learner.learner.{name}"]) for name, value in found.items())


# What is asked for


def test_views_are_those_of_finetuning_normalised_for_the_encoder():
    config = composed(["task=detect", *JOINT, "data.workers=1"])
    encoder = Encoder("resnet10t", width=0.125).eval()
    found = class_images(config, settings_of(config), encoder)
    assert encoder.training
    finetune = OmegaConf.merge(composed(["task=finetune"]), {"image_size": 24})
    assert list(found.views.views) == list(parse(plain(with_task_views(finetune).views)))
    assert (len(found.train), found.batch_size, found.workers, found.seed) == (8192, 8, 1, config.seed + 2)
    gray = np.full((1, 32, 32, 3), 51, np.uint8)
    mean, std = (torch.tensor(list(config.data[key])) for key in ("mean", "std"))
    (x,) = found.views(gray, np.zeros(1, int), 0)
    torch.testing.assert_close(x[0, :, 0, 0], (0.2 - mean) / std, rtol=1e-3, atol=1e-3)


def test_batches_that_devices_do_not_share_evenly_are_refused_by_their_own_name():
    config = composed(["task=detect", *JOINT, "trainer.devices=3"])
    with pytest.raises(UserError, match=r"task\.joint\.batch_size=8 does not split evenly over 3 devices; set it to 9"):
        class_images(config, settings_of(config), Encoder("resnet10t", width=0.125))


def test_images_without_a_label_are_left_out(monkeypatch):
    some = image_set(12, size=32)
    some.labels[::4] = -1
    monkeypatch.setattr("sslzoo.tasks.joint.images", lambda config: images(some, None))
    config = composed(["task=detect", "task.joint.data=stl10", "task.joint.batch_size=9"])
    found = class_images(config, settings_of(config), Encoder("resnet10t", width=0.125))
    assert np.array_equal(found.train.images, some.images[some.labels >= 0])
    assert np.array_equal(found.train.labels, some.labels[some.labels >= 0])


def test_no_data_no_second_task_and_a_set_may_move():
    assert settings_of(composed(["task=detect"])) is settings_of(composed(["task=detect", "task.joint=null"])) is None
    one, other = (composed(["task=detect", *JOINT, f"task.joint.root={root}"]) for root in ("a", "b"))
    assert config_hash(one) == config_hash(other)
    assert not list(differences(one, other))
    assert list(differences(one, composed(["task=detect", *JOINT, "task.joint.weight=2.0"])))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.joint.data=cars"], "task.joint.data=cars is no set of images with classes; give one of photos, cifar1"),
        (["task.joint.data=coco"], "task.joint.data=coco is no set of images with classes"),
        (["task.joint.lr=1"], "task.joint.lr is no setting; task.joint has data, root, batch_size, size, weight"),
        (["task.joint={data: photos, lr: 1}"], "Key 'lr' is not in struct"),
        (["task.joint.data=photos", "task.joint.batch_size=0"], "task.joint.batch_size=0 is no whole number of 1 or"),
        (["task.joint.data=photos", "task.joint.batch_size=9000"], "batch_size=9000 is more than the 8192 labelled"),
        (["task.joint.data=photos", "task.joint.size=2.5"], "task.joint.size=2.5 is no whole number of 1 or more"),
        (["task.joint.data=photos", "task.joint.weight=-1"], "task.joint.weight=-1 is no weight of a loss; give a"),
        (["task.joint.data=photos", "task.joint.weight=inf"], "task.joint.weight=inf is no weight of a loss"),
        (["task.joint.data=folder"], "task.joint.data=folder cannot be used: data.root is null"),
        (["task.joint.data=folder", "task.joint.root=FLAT"], "folder has no labels to learn from; put images in class"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_written(tmp_path, root, capsys, words, message):
    words = [word.replace("FLAT", str(root / "flat")) for word in words]
    assert main([*command(root), *words, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_views_that_the_encoder_cannot_see_are_refused(tmp_path, root, capsys):
    encoder = Encoder("vit_tiny_patch16_224", options={"img_size": 64, "depth": 4, "embed_dim": 24, "num_heads": 2})
    where = {"method": "moco_v3", "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 64, "config_hash": ""}
    path = save_backbone(encoder, tmp_path / "backbone.safetensors", **where)
    words = [word for word in command(root) if not word.startswith("backbone")]
    assert main([*words, f"backbone={path}", *JOINT]) == 2
    said = capsys.readouterr().err
    assert "the backbone takes no images of task.joint.size=24 pixels" in said
    assert "set task.joint.size to its own" in said
