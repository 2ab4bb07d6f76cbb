"""Distillation: what the student learns from, what stays as it is, what a run leaves, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import Tiny
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from runs import checkpoint_of, killed_before
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.checkpoints.backbone import load_backbone, save_backbone
from sslzoo.checkpoints.classifier import Tuned, load_classifier, load_tuned, save_classifier
from sslzoo.data.photos import PHOTOS
from sslzoo.downstream.distill import Distill, kd_loss, soft_loss
from sslzoo.errors import UserError
from sslzoo.optim import Optim

SMALL = [
    "task=distill",
    "data.train_size=160",
    "data.val_size=40",
    "data.batch_size=32",
    "data.workers=1",
    "encoder.name=resnet10t",
    "encoder.width=0.0625",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "monitor.log_every=1",
]
SEEN = {"method": "simclr+finetune", "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 16, "config_hash": "0" * 12}
CLASSES = list(PHOTOS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """What a fine-tuning run leaves, with random weights."""
    run_dir = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    encoder = Encoder("resnet10t", stem="small", width=0.125)
    save_backbone(encoder, run_dir / "backbone.safetensors", **SEEN)
    linear = nn.Linear(encoder.dim, len(CLASSES))
    save_classifier(linear, run_dir / "classifier.safetensors", CLASSES)
    return run_dir


def complaint(capsys, *arguments):
    """The one line a mistake is told in."""
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sslzoo: ")
    return line


# ---- the losses ----


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_losses_are_those_of_a_loop(temperature):
    student, teacher = torch.randn(2, 5, 3, dtype=torch.double)
    soft = kd = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(v / temperature) for v in logits] for logits in (t, s))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        soft -= temperature**2 * sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / 5
        kd += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    assert soft_loss(student, teacher, temperature).item() == pytest.approx(soft)
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(kd)
    assert kd_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)


def make(**options) -> Distill:
    teacher = Tuned(Tiny(dim=10), nn.Sequential(), nn.Linear(10, 4), list("abcd"))
    optim = Optim(lr=0.1, lr_per=None, weight_decay=1e-3)
    return sync_batchnorm(Distill(Tiny(), teacher, optim, **options).double())


def make_mixed() -> Distill:
    return make(labelled_weight=0.3)


def make_crd() -> Distill:
    return make(loss="crd", temperature=4.0, size=64, dim=6, negatives=9)


def labelled_batches(steps: int = 3):
    """Five of eight images have a label, more of the first half."""
    label = torch.tensor([0, 3, -1, 2, -1, 1, -1, 2])
    return [batch._replace(label=label) for batch in random_batches(steps, 8, [(12,)])]


@pytest.mark.parametrize("make_method", [make_mixed, make_crd])
def test_two_ranks_learn_what_one_does(make_method):
    alone = train_alone(make_method, labelled_batches())
    first, second = train_on_ranks(2, make_method, labelled_batches())
    for rank in (first, second):
        assert_same(alone, rank)
    for name, value in first["state"].items():
        if "bank" in name:
            assert torch.equal(value, second["state"][name]), name


def test_labels_weigh_as_told_and_images_without_one_do_not_count():
    method, (batch,) = make_mixed(), labelled_batches(1)
    told, said = method.teacher(*batch.views), method(*batch.views)
    known = batch.label >= 0
    expected = 0.7 * soft_loss(said, told) + 0.3 * nn.functional.cross_entropy(said[known], batch.label[known])
    torch.testing.assert_close(method.loss(batch), expected)
    nothing = batch._replace(label=torch.full((8,), -1))
    torch.testing.assert_close(method.loss(nothing), 0.7 * soft_loss(said, told))


def test_the_teacher_keeps_its_weights_and_statistics_and_gets_no_gradient():
    method = make_crd()
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    result = train_alone(lambda: method, labelled_batches())
    assert not [name for name in result["grads"] if name.startswith("teacher.")]
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert method.training
    assert not any(part.training for part in method.teacher.modules())


def test_memories_move_after_the_loss_and_only_those_of_the_batch():
    method, (batch,) = make_crd(), labelled_batches(1)
    before = method.contrast.bank_s.slots.clone(), method.contrast.bank_t.slots.clone()
    method.loss(batch)
    assert torch.equal(method.contrast.bank_s.slots, before[0])
    method.after_step()
    for bank, old in zip((method.contrast.bank_s, method.contrast.bank_t), before, strict=True):
        moved = (bank.slots != old).any(1)
        assert moved.nonzero().squeeze(1).tolist() == sorted(batch.index.tolist())


def test_crd_teaches_the_classifier_too():
    method, (batch,) = make_crd(), labelled_batches(1)
    method.loss(batch).backward()
    assert method.classifier.weight.grad.abs().sum() > 0
    assert method.contrast.embed_t[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "mse"}, "task.loss=mse is none of soft, kd, crd"),
        ({"temperature": 0.0}, "task.temperature=0.0 divides logits"),
        ({"labelled_weight": 1.5}, "task.labelled_weight=1.5 is no share"),
        ({"loss": "crd", "size": 64, "negatives": 0}, "task.negatives=0"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(UserError, match=told):
        make(**options)


# ---- a run ----


CRD = ["task.loss=crd", "task.temperature=4", "task.negatives=32", "task.dim=16", "task.labelled_weight=0.2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher):
    run_dir = tmp_path_factory.mktemp("runs") / "distill"
    return run_dir, run([*SMALL, *CRD, f"task.teacher={teacher}", "data.label_fraction=0.25", f"run_dir={run_dir}"])


def test_a_run_leaves_a_student_of_its_own_size_and_both_scores(finished, teacher):
    run_dir, summary = finished
    assert json.loads((run_dir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["task"], summary["steps"], summary["labelled_images"]) == ("distill", 10, 40)
    assert 0 <= summary["distill_top1"] <= summary["distill_top5"] <= 1
    assert 0 <= summary["teacher_top1"] <= 1
    assert len((run_dir / "labelled.txt").read_text().split()) == 40
    student = load_tuned(run_dir)
    assert student.classes == CLASSES
    assert student.encoder.dim == load_backbone(teacher / "backbone.safetensors").dim // 2
    assert student.encoder.metadata["image_size"] == 16
    assert student.encoder.metadata["mean"] == [0.5] * 3
    state = checkpoint_of(run_dir)["state_dict"]
    assert torch.equal(state["classifier.weight"], student.classifier.weight)


def test_killed_and_resumed_equals_unbroken(tmp_path, finished, teacher):
    run_dir = tmp_path / "broken"
    arguments = [*SMALL, *CRD, f"task.teacher={teacher}", "data.label_fraction=0.25", "checkpoint.steps=3"]
    with killed_before(7):
        run([*arguments, f"run_dir={run_dir}"])
    run([f"resume={run_dir}"])
    one, other = checkpoint_of(finished[0]), checkpoint_of(run_dir)
    assert one["global_step"] == other["global_step"] == 10
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    final = json.loads((run_dir / "summary.json").read_text())
    for key in ("loss", "distill_top1", "teacher_top1", "steps", "epochs", "config_hash"):
        assert final[key] == finished[1][key], key


def test_images_without_labels_or_a_held_out_set_will_do(tmp_path, teacher):
    folder = tmp_path / "loose"
    folder.mkdir()
    for n in range(8):
        pixels = np.random.default_rng(n).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    loose = ["data=folder", f"data.root={folder}", "data.batch_size=4", f"run_dir={tmp_path / 'run'}"]
    of_sets = ("data.train_size", "data.val_size", "data.batch_size")
    rest = [word for word in SMALL if not word.startswith(of_sets)]
    summary = run([*rest, *loose, f"task.teacher={teacher}", "trainer.max_epochs=1"])
    assert (summary["steps"], summary["labelled_images"], summary["distill_top1"]) == (2, 0, None)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "task=distill needs task.teacher="),
        (["task.teacher=nowhere"], "nowhere is no directory; give that of a task=finetune run"),
        (["task.teacher={teacher}", "task.loss=mse"], "task.loss=mse is none of"),
        (["task.teacher={teacher}", "optim.lr=1"], "type task.optim.lr=1"),
        (["task.teacher={teacher}", "data.label_fraction=0.5"], "task.labelled_weight=0 uses none"),
        (["task.teacher={teacher}", "backbone=nowhere"], "backbone=nowhere is no file"),
        (["task.teacher={teacher}", "data=cifar10", "data.root=nowhere"], "data=cifar10 is missing"),
    ],
)
def test_settings_that_do_not_work_are_refused(capsys, teacher, arguments, told):
    words = [word.format(teacher=teacher) for word in arguments]
    of_sets = ("data.train_size", "data.val_size") if "data=cifar10" in words else ()
    rest = [word for word in SMALL if not word.startswith(of_sets)] if of_sets else SMALL
    assert told in complaint(capsys, *rest, *words)


def test_a_run_without_a_classifier_is_no_teacher(capsys, tmp_path, teacher):
    (tmp_path / "backbone.safetensors").write_bytes((teacher / "backbone.safetensors").read_bytes())
    line = complaint(capsys, *SMALL, f"task.teacher={tmp_path}")
    assert "classifier.safetensors is no file; give the directory of a task=finetune run" in line
    (tmp_path / "classifier.safetensors").write_bytes(b"nothing")
    assert "is no classifier of sslzoo" in complaint(capsys, *SMALL, f"task.teacher={tmp_path}")


def test_a_classifier_of_another_backbone_is_refused(capsys, tmp_path, teacher):
    (tmp_path / "backbone.safetensors").write_bytes((teacher / "backbone.safetensors").read_bytes())
    save_classifier(nn.Linear(7, 10), tmp_path / "classifier.safetensors", CLASSES)
    assert "they are not of one run" in complaint(capsys, *SMALL, f"task.teacher={tmp_path}")


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        ([*CLASSES[:-1], "zebra"], "is in one of them only"),
        (CLASSES[::-1], "in another order"),
        (["cat", "dog"], "names 2 classes, photos has 10"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(capsys, tmp_path, teacher, classes, told):
    (tmp_path / "backbone.safetensors").write_bytes((teacher / "backbone.safetensors").read_bytes())
    linear, _ = load_classifier(teacher / "classifier.safetensors")
    save_classifier(nn.Linear(linear.in_features, len(classes)), tmp_path / "classifier.safetensors", classes)
    assert told in complaint(capsys, *SMALL, f"task.teacher={tmp_path}")


def test_a_student_of_images_of_another_size_is_refused(capsys, tmp_path, teacher):
    encoder = load_backbone(teacher / "backbone.safetensors")
    path = save_backbone(encoder, tmp_path / "other.safetensors", **{**SEEN, "image_size": 24})
    line = complaint(capsys, *SMALL, f"task.teacher={teacher}", f"backbone={path}")
    assert "was trained with image_size=24, the teacher" in line


def test_a_share_of_the_loss_for_labels_needs_labels(capsys, tmp_path, teacher):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    rest = [word for word in SMALL if not word.startswith(("data.train_size", "data.val_size"))]
    words = ["data=folder", f"data.root={tmp_path}", f"task.teacher={teacher}", "task.labelled_weight=0.5"]
    assert "folder has no labels to learn from" in complaint(capsys, *rest, *words)
