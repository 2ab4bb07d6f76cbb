"""Self-training of classifiers: its parts, what they share, that they go on, what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runs import archive, checkpoint_of, in_this_process
from selftraining import PARTS, assert_parts, assert_resumes, summary_of
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.checkpoints import save_backbone
from sslzoo.config import composed, keys_of
from sslzoo.data.pseudo_classes import PseudoClasses
from sslzoo.data.subsets import balanced
from sslzoo.tasks import finetune, selftrain_grid
from sslzoo.tasks.parts import own_settings
from sslzoo.tasks.selftrain_cell import part_words


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """64 training and 24 held-out pictures of 16 pixels, in three classes."""
    return archive(tmp_path_factory.mktemp("noise") / "noise.npz")


def command(root, *more: str) -> list[str]:
    """A quarter of the labels: 16 images."""
    return [
        "task=selftrain", "data=npz", f"data.root={root}", "label_fraction=0.25", "threshold=0.34", "per_class=20",
        "steps=6", "data.batch_size=8", "data.workers=1", "encoder.width=0.125", "image_size=16",
        "trainer.accelerator=cpu", "trainer.precision=32-true", "monitor.log_every=1", "checkpoint.steps=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, run(command(root, f"run_dir={run_dir}"))


def true_labels(root) -> np.ndarray:
    with np.load(root) as archived:
        return archived["train_labels"]


# A run


def test_a_run_has_a_teacher_pseudo_labels_a_student_and_a_control(finished):
    run_dir, summary = finished
    assert_parts(run_dir, summary, "top1", steps=6, images=48, part_score="finetune_top1")
    parts = [summary_of(run_dir / name) for name in PARTS]
    assert {part["labelled_images"] for part in parts} == {summary["labelled_images"]}
    assert len({part["lr"] for part in parts}) == 1


def test_all_parts_start_from_the_same_weights_bit_for_bit(finished, root):
    run_dir, _ = finished
    starts = {summary_of(run_dir / name)["start"] for name in PARTS}
    assert len(starts) == 1
    words = part_words(composed(command(root)), ["data=npz"], 6, 16)
    assert finetune.ready(composed(words), words).start in starts
    assert finetune.ready(composed([*words, "seed=1"]), words).start not in starts


def test_the_teacher_names_all_images_but_those_it_learned_from(finished, root):
    run_dir, summary = finished
    truth = true_labels(root)
    learned = balanced(truth, 0.25)
    with np.load(run_dir / "pseudo" / "labels.npz") as told:
        rows, probabilities, taken = told["rows"], told["probabilities"], told["taken"]
    assert sorted([*rows, *learned]) == list(range(64))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    pseudo = summary["pseudo"]
    assert probabilities[taken].max(1).min() >= 0.34
    assert (pseudo["images"], pseudo["taken_images"]) == (len(rows), len(taken))
    assert pseudo["confident_images"] == (probabilities.max(1) >= 0.34).sum()
    assert list(pseudo["per_class"].values()) == np.bincount(probabilities[taken].argmax(1), minlength=3).tolist()
    assert set(pseudo["per_class"].values()) <= {0, 20}
    right = [probabilities[k].argmax() == truth[rows[k]] for k in set(taken.tolist())]
    assert pseudo["right"] == pytest.approx(np.mean(right))
    assert pseudo["judged_images"] == len(right)


@pytest.mark.parametrize("soft", [True, False])
def test_a_students_batches_are_half_human_and_half_pseudo(finished, root, soft):
    run_dir, _ = finished
    config = composed(command(root, f"soft={soft}"))
    words = part_words(config, ["data=npz"], 6, 16, run_dir / "pseudo")
    seen = finetune.ready(composed(words), words)
    one = SimpleNamespace(global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    seen.data.trainer = one
    truth, pseudo = true_labels(root), PseudoClasses.read(run_dir / "pseudo" / "labels.npz", seen.whole)
    count = 0
    for human, other in seen.data.train_dataloader():
        assert len(human.index) == len(other.index) == len(human.views[0]) == len(other.views[0]) == 8
        assert human.label.tolist() == truth[seen.rows[human.index]].tolist()
        said = torch.from_numpy(pseudo.probabilities[pseudo.taken[other.index]])
        assert torch.equal(other.label, said if soft else said.argmax(1))
        count += 1
    assert count == 16 // 8


@pytest.mark.slow
@pytest.mark.parametrize(("part", "step"), [("teacher", 5), ("student", 3)])
def test_a_run_killed_in_any_part_and_resumed_equals_an_unbroken_one(tmp_path, root, finished, part, step):
    assert_resumes(command(root), finished, tmp_path / "broken", part, step, "top1")


def test_a_teacher_that_is_never_sure_gets_one_clear_line(tmp_path, root, capsys):
    run_dir = tmp_path / "unsure"
    words = [each for each in command(root) if not each.startswith(("threshold", "steps"))]
    assert main([*words, "threshold=1.0", "steps=1", f"run_dir={run_dir}"]) == 2
    said = capsys.readouterr().err
    assert "only 0 of 48 unlabelled images have a class of probability 1 or more" in said
    assert "set a lower threshold" in said
    assert not (run_dir / "pseudo").exists()
    assert not (run_dir / "student").exists()
    assert (run_dir / "teacher" / "summary.json").is_file()


@pytest.mark.slow
def test_a_student_may_be_another_network_and_its_control_is_the_same(tmp_path, root):
    larger = "student={encoder: {width: 0.25}}"
    words = [each for each in command(root) if not each.startswith(("steps", "threshold"))]
    summary = run([*words, "steps=2", "threshold=0.0", "iterations=2", larger, f"run_dir={tmp_path / 'run'}"])
    size = {}
    for part in ("teacher", "student", "student_2", "control"):
        weights = checkpoint_of(tmp_path / "run" / part)["state_dict"]
        size[part] = next(value.shape for name, value in weights.items() if name.endswith("layer1.0.conv1.weight"))
    assert size["teacher"] < size["student"] == size["student_2"] == size["control"]
    assert summary["student"]["start"] == summary["control"]["start"] != summary["supervised"]["start"]


@pytest.mark.parametrize("student", ["resnet18", "{width: 0.5}", "{}"])
def test_a_student_that_is_no_network_is_refused(tmp_path, root, capsys, student):
    assert main([*command(root), f"student={student}", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "names no network; give {init: B} or {encoder: {name: resnet18}}" in capsys.readouterr().err
    assert main([*command(root), "student={encoder: {name: resnet7}}", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "resnet7" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Its parts as runs of their own


@pytest.mark.parametrize(
    "typed",
    [["data=photos"], ["data=cifar10", "encoder=resnet18", "init=timm/resnet18", "task.views.full.gray=0.2", "seed=3"]],
)
def test_a_part_is_a_run_of_fine_tuning_with_the_settings_of_the_whole(typed, tmp_path):
    config = composed(["task=selftrain", *typed])
    words = part_words(config, typed, steps=300, images=640, pseudo=tmp_path)
    part, whole = keys_of(composed(words)), keys_of(config)
    assert {key: part.pop(f"task.pseudo.{key}") for key in ("file", "soft", "alpha")} == {
        "file": str(tmp_path / "labels.npz"),
        "soft": True,
        "alpha": 1.0,
    }
    own = own_settings("selftrain_classes") | {"task"}
    assert {key for key in whole if key.partition(".")[0] not in own} <= part.keys()
    changed = {"task.name", "backbone", "task.every_epochs", "task.optim.warmup_epochs", "trainer.max_steps"}
    assert {key for key in part if part[key] != whole[key]} <= changed
    assert (part["task.name"], part["backbone"]) == ("finetune", str(config.init))
    assert (part["trainer.max_steps"], part["data.label_fraction"]) == (300, 0.1)
    assert part["task.optim.warmup_epochs"] * 10 == pytest.approx(15)
    assert part["task.every_epochs"] == 3


@pytest.mark.parametrize(("data", "classes"), [("photos", True), ("folder", True), ("scenes", False), ("coco", False)])
def test_the_kind_of_the_data_decides_what_is_learned(data, classes):
    config = composed(["task=selftrain", f"data={data}"])
    assert (config.task.name, config.data.name) == ("selftrain", data)
    assert ("per_class" in config, "model" in config.task) == (classes, not classes)
    assert "model" in composed(["task=selftrain"]).task


# Grids


@pytest.mark.slow
def test_a_grid_of_classifiers_has_the_form_of_detections_and_no_published_ap(tmp_path, monkeypatch, root):
    monkeypatch.setattr(selftrain_grid, "together", in_this_process)
    torch.manual_seed(5)
    about = {"method": "moco", "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 16, "config_hash": ""}
    backbone = save_backbone(
        Encoder("resnet10t", width=0.125, stem="small"), tmp_path / "backbone.safetensors", **about
    )
    words = [*command(root), f"init={backbone}", "fractions=[0.5]", "steps=2", "monitor.log_every=2"]
    words = [each for each in words if not each.startswith(("label_fraction", "checkpoint", "threshold"))]
    summary = run([*words, "threshold=0.0", "grid=fraction", f"run_dir={tmp_path / 'grid'}"])
    table = (tmp_path / "grid" / "table.md").read_text()
    assert table.startswith("## grid=fraction, npz: top-1 in %")
    assert "paper:" not in table.split("##")[1]
    assert (tmp_path / "grid" / "figure.png").is_file()
    cells = {name: summary_of(tmp_path / "grid" / "cells" / name) for name in summary["cells"]}
    assert {cell["init"] for cell in cells.values()} == {"random", str(backbone)}
    rows = dict(line.strip("| ").split(" | ") for line in table.split("\n\n")[1].splitlines())
    for cell in cells.values():
        name = "random" if cell["init"] == "random" else "moco"
        assert rows[name] == f"{100 * cell['supervised']['top1']:.1f} (1)"
        assert rows[f"{name} + self-training"].startswith(f"{100 * cell['top1']:.1f} (1) ")
        assert rows[f"{name}, control of as many images"].startswith(f"{100 * cell['control']['top1']:.1f} (1) ")


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["threshold=match-density"], "threshold=match-density is no probability"),
        (["init=none.safetensors"], "backbone=none.safetensors is no file"),
        (["init=[random,imagenet]"], "init=['random', 'imagenet'] are several"),
        (["label_fraction=1.0"], "none is left to label"),
        (["label_fraction=2"], "data.label_fraction=2 is no fraction"),
        (["alpha=-1"], "alpha=-1"),
        (["soft=maybe"], "soft=maybe is neither true nor false"),
        (["per_class=0"], "per_class=0 is no whole number of 1 or more"),
        (["steps=0"], "steps=0 is no whole number of 1 or more"),
        (["data.batch_size=32"], "data.batch_size=32 is more than the 16 labelled images"),
        (["data.label_fraction=0.2"], "type label_fraction= instead"),
        (["trainer.max_steps=9"], "type steps= instead"),
        (["grid=augment", "init=timm/resnet18"], "s1 to s4, which images to classify do not have; take grid=fraction"),
        (["optim.lr=1"], "for task=selftrain type task.optim.* or task.views.*"),
        (["trainer.accumulate_grad_batches=2"], "does not accumulate gradients"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_written(tmp_path, root, capsys, words, message):
    keys = {each.partition("=")[0] for each in words}
    kept = [each for each in command(root) if each.partition("=")[0] not in keys]
    assert main([*kept, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said.splitlines()[-1]
    assert said.count("sslzoo: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pseudo", ["labels.npz", "{soft:true}", "{file:a.npz,weight:2}"])
def test_pseudo_labels_that_are_not_named_are_refused(tmp_path, root, capsys, pseudo):
    words = ["task=finetune", "backbone=random", "data=npz", f"data.root={root}", "encoder.width=0.125"]
    words += ["data.batch_size=8", "trainer.accelerator=cpu", f"task.pseudo={pseudo}", f"run_dir={tmp_path / 'run'}"]
    assert main(words) == 2
    assert "names no pseudo-labels; give {file: FILE, soft: true, alpha: 1.0}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
