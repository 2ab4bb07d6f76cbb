"""Runs of self-training: their parts, what they share, that they go on; grids of them; what is refused."""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from boxed import write_coco, write_voc
from runs import Killed, checkpoint_of, in_this_process
from selftraining import PARTS, assert_parts, assert_resumes, summary_of
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.checkpoints import save_backbone
from sslzoo.config import composed, keys_of
from sslzoo.data.boxes import labelled_images
from sslzoo.report.csv_log import read_rows
from sslzoo.tasks import selftrain_grid
from sslzoo.tasks.detect import load_sets
from sslzoo.tasks.parts import moved, own_settings, word
from sslzoo.tasks.selftrain_boxes import unlabelled
from sslzoo.tasks.selftrain_cell import part_words, steps_of


def squares(root, split: str, count: int, seed: int) -> dict:
    """Pictures of 64 pixels with one or two red squares, and COCO's description of them."""
    rng = np.random.default_rng(seed)
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        pixels = rng.integers(90, 150, (64, 64, 3), dtype=np.uint8)
        images.append({"id": 10 + 3 * i, "file_name": f"{10 + 3 * i}.png", "height": 64, "width": 64})
        for k in range(1 + i % 2):
            left, top = (int(corner) for corner in rng.integers(2, 10, 2) + 28 * k)
            pixels[top : top + 24, left : left + 24] = (230, 40, 40)
            annotations.append({"id": len(annotations) + 1, "image_id": 10 + 3 * i, "category_id": 5, "iscrowd": 0,
                                "bbox": [left, top, 24, 24], "area": 576})  # fmt: skip
        Image.fromarray(pixels).save(folder / images[-1]["file_name"])
    return {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "square"}]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 training and 6 held-out pictures."""
    root = tmp_path_factory.mktemp("squares")
    return write_coco(root, squares(root, "train", 40, 0), squares(root, "val", 6, 1))


def command(root, *more: str) -> list[str]:
    return [
        "task=selftrain", "data=coco", f"data.root={root}", "label_fraction=0.5", "threshold=match-density", "steps=8",
        "growth=0.0", "looks=2", "data.batch_size=4", "data.workers=1", "encoder.width=0.125", "task.min_size=64",
        "task.max_size=64", "task.channels=16", "task.convs=1", "task.score=0.0", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "monitor.log_every=1", "checkpoint.steps=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, run(command(root, f"run_dir={run_dir}"))


# A run


@pytest.mark.slow
def test_a_run_has_a_teacher_pseudo_labels_a_student_and_a_control(finished):
    run_dir, summary = finished
    assert_parts(run_dir, summary, "map", steps=8, images=32)
    assert [summary_of(run_dir / name)["train_images"] for name in PARTS] == [20, 20, 20]
    files = {path.name for path in (run_dir / "pseudo").iterdir()}
    assert files == {"labels.json", "boxes.png", "scores.png", "summary.json"}
    pseudo = summary["pseudo"]
    assert pseudo["boxes_per_image"] == pytest.approx(pseudo["labelled_boxes_per_image"], abs=0.1)
    assert pseudo["judged_images"] == pseudo["images"] == 20
    assert 0 <= pseudo["precision"] <= 1


@pytest.mark.slow
def test_all_parts_start_from_the_rows_init_bit_for_bit(finished, root):
    run_dir, _ = finished
    starts = {summary_of(run_dir / name)["start"] for name in PARTS}
    assert len(starts) == 1
    other = run(["task=detect", *map(str, teacher_words(run_dir)), f"run_dir={run_dir.parent / 'other'}", "seed=1",
                 "trainer.max_steps=1"])  # fmt: skip
    assert other["start"] not in starts


def teacher_words(run_dir) -> list[str]:
    words = shlex.split((run_dir / "teacher" / "command.txt").read_text())[4:]
    return [each for each in words if not each.startswith(("run_dir=", "trainer.max_steps="))]


@pytest.mark.slow
def test_no_left_out_image_teaches_and_no_labelled_one_is_labelled_again(finished):
    run_dir, _ = finished
    content = json.loads((run_dir / "pseudo" / "labels.json").read_text())
    labelled = {10 + 3 * i for i in labelled_images(40, 0.5).tolist()}
    assert {image["id"] for image in content["images"]} == {10 + 3 * i for i in range(40)} - labelled


@pytest.mark.slow
@pytest.mark.parametrize(("part", "step"), [("teacher", 5), ("student", 3)])
def test_a_run_killed_in_any_part_and_resumed_equals_an_unbroken_one(tmp_path, root, finished, part, step):
    assert_resumes(command(root), finished, tmp_path / "broken", part, step, "map")


@pytest.mark.slow
def test_joint_training_is_every_parts_and_a_moving_teacher_the_students_alone(tmp_path, root):
    run_dir = tmp_path / "run"
    words = [each for each in command(root) if not each.startswith(("steps", "threshold"))]
    more = ["steps=4", "threshold=1.0", "teacher={decay:0.5,burn_in:0.5,threshold:0.0}", "task.joint.data=photos"]
    summary = run([*words, *more, "task.joint.batch_size=4", f"run_dir={run_dir}"])
    parts = {name: summary_of(run_dir / name) for name in PARTS}
    assert [part["joint"]["images_seen"] for part in parts.values()] == [16, 16, 24]
    assert [part["teacher"] is None for part in parts.values()] == [True, False, True]
    assert [part["images_seen"] for part in parts.values()] == [16, 24, 24]  # no pseudo half in the burn-in
    assert summary["student"]["teacher"] == parts["student"]["teacher"]
    assert parts["student"]["teacher"]["pseudo_boxes"] > 0  # although the fixed teacher was sure of nothing
    rows = read_rows(run_dir / "student" / "metrics.csv")
    assert [row["pseudo_boxes"] for row in rows if "pseudo_boxes" in row][-1] == summary["student"]["teacher"][
        "pseudo_boxes"
    ]
    assert len({part["start"] for part in parts.values()}) == 1


@pytest.mark.slow
def test_what_may_change_where_a_run_goes_on_reaches_its_parts_and_nothing_is_lost(tmp_path, finished):
    run_dir, summary = tmp_path / "again", finished[1]
    copytree(finished[0], run_dir)
    resumed = run([f"resume={run_dir}", "task.also=[val2017]", "self_training=false", "data.workers=2"])
    for name, part in (("supervised", "teacher"), ("student", "student"), ("control", "control")):
        assert resumed[name]["also"]["val2017"]["map"] == resumed[name]["map"] == summary[name]["map"]
        assert summary_of(run_dir / part)["also"].keys() == {"val2017"}
        one, other = (checkpoint_of(top / part)["state_dict"] for top in (finished[0], run_dir))
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert OmegaConf.load(run_dir / "config.yaml").self_training is True


def test_what_is_typed_for_a_part_that_goes_on_is_what_has_moved(tmp_path):
    begun = tmp_path / "config.yaml"
    OmegaConf.save(composed(["task=detect", "backbone=random", "data=coco", "data.root=/old", "seed=1"]), begun)
    words = ["task=selftrain", "data=coco", "data.root=/new", "trainer.devices=2", "seed=2", "data.on_error=raise"]
    assert set(moved(begun, composed(words))) == {
        "data.root=/new", "trainer.devices=2", "data.on_error=raise"
    }  # fmt: skip


def test_masks_of_pascal_are_labelled_in_no_image_that_taught_the_teacher(tmp_path):
    names = [f"{number:06d}" for number in range(12)]
    objects = {name: [("dog", 0, 1, 1, 10, 20)] for name in names}
    lists = {"train": names, "val": ["val"], "trainval": names}
    root = write_voc(tmp_path, 2012, lists, {**objects, "val": objects[names[0]]},
                     segmentation={name: {"dog": 12} for name in [*names[::2], "val"]})  # fmt: skip
    words = ["task=selftrain", "data=voc", f"data.root={root}", "data.years=2012", "task.model=mask_rcnn_fpn"]
    config = composed([*words, "label_fraction=0.5", "data.batch_size=2"])
    train, _ = load_sets(config, masks=True)
    others = unlabelled(config)
    assert (len(train), len(others)) == (3, 3)
    assert {*train.image_ids, *others.image_ids} == set(names[::2])


@pytest.mark.slow
def test_a_damaged_unlabelled_picture_is_met_before_the_teacher_and_skipped_where_asked(tmp_path, capsys):
    top = tmp_path / "coco"
    root = write_coco(top, squares(top, "train", 40, 0), squares(top, "val", 6, 1))
    damaged = min({*range(40)} - set(labelled_images(40, 0.5).tolist()))
    (root / "train2017" / f"{10 + 3 * damaged}.png").write_bytes(b"damaged")
    words = [each for each in command(root) if not each.startswith("steps")]
    assert main([*words, "data.on_error=raise", f"run_dir={tmp_path / 'raised'}"]) == 2
    assert f"{10 + 3 * damaged}.png" in capsys.readouterr().err
    assert not (tmp_path / "raised").exists()
    summary = run([*words, "steps=1", "data.on_error=skip", f"run_dir={tmp_path / 'skipped'}"])
    assert summary["pseudo"]["images"] == 19


@pytest.mark.slow
def test_a_teacher_that_is_never_sure_gets_one_clear_line(tmp_path, root, capsys):
    run_dir = tmp_path / "unsure"
    words = [each for each in command(root) if not each.startswith("threshold")]
    assert main([*words, "threshold=1.0", f"run_dir={run_dir}", "steps=1"]) == 2
    said = capsys.readouterr().err
    assert "only 0 of 20 unlabelled images have a box of score 1 or more" in said
    assert "set threshold=match-density" in said
    assert not (run_dir / "pseudo").exists()
    assert not (run_dir / "student").exists()
    assert (run_dir / "teacher" / "summary.json").is_file()


# Its parts as runs of their own


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["data=coco", "data.root=/data", "encoder=resnet50", "task.model=fcos", "augment=s3", "alpha=0.5", "seed=3"],
        ["task.min_size=[64,96]", "task.clip=null", "data.label_list=null", "init=timm/resnet18", "trainer.devices=1"],
    ],
)
def test_a_part_is_a_run_of_detection_with_the_settings_of_the_whole(typed):
    config = composed(["task=selftrain", "label_fraction=0.2", *typed])
    words = part_words(config, typed, steps=300, images=400)
    part, whole = keys_of(composed(words)), keys_of(config)
    changed = {"task.name", "backbone", "task.every_epochs", "task.optim.warmup_epochs", "trainer.max_steps"}
    own = {key for key in whole if key.partition(".")[0] in own_settings()}
    assert part.keys() == whole.keys() - own
    assert {key for key in part if part[key] != whole[key]} <= changed
    assert (part["task.name"], part["backbone"]) == ("detect", str(config.init))
    assert (part["trainer.max_steps"], part["trainer.max_epochs"]) == (300, -1)
    an_epoch = 400 // config.data.batch_size
    assert part["task.optim.warmup_epochs"] * an_epoch == pytest.approx(15)
    assert part["task.every_epochs"] == 300 // an_epoch // 8


def test_schedules_grow_with_labels_and_with_augmentation():
    def steps(*typed):
        return steps_of(composed(["task=selftrain", *typed]))

    assert steps() == 2400
    assert [steps(f"label_fraction={part}", "steps=1000") for part in (0.0625, 0.1, 1.0)] == [500, 562, 1000]
    assert steps("augment=s4") == 3600
    assert steps("label_fraction=0.1", "growth=0.0") == 2400


@pytest.mark.parametrize("seed", [0, 1])
def test_label_fractions_nest(seed):
    parts = [set(labelled_images(1000, part, seed).tolist()) for part in (0.1, 0.2, 0.5, 1.0)]
    assert [len(part) for part in parts] == [100, 200, 500, 1000]
    assert all(smaller < larger for smaller, larger in pairwise(parts))


def test_words_are_quoted_only_where_they_must_be():
    values = ["random", "runs/a.safetensors", "a b", "null", None, True, 0.5, [1, 2], "1e3", "x=y"]
    assert [word(value) for value in values] == [
        *("random", "runs/a.safetensors", '"a b"', '"null"', "null", "true", "0.5", "[1, 2]", '"1e3"', '"x=y"')
    ]


# Grids


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file like a pretraining run's, of the network that ``command`` trains."""
    torch.manual_seed(5)
    about = {"method": "moco", "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 64, "config_hash": ""}
    encoder = Encoder("resnet10t", width=0.125)
    return save_backbone(encoder, tmp_path_factory.mktemp("moco") / "backbone.safetensors", **about)


@pytest.mark.slow
def test_a_grid_killed_and_resumed_equals_an_unbroken_one_and_repeats_nothing(tmp_path, monkeypatch, root, backbone):
    monkeypatch.setattr(selftrain_grid, "together", in_this_process)
    for where in (
        "detect.curves",
        "detect.predictions",
        "selftrain_boxes.predictions",
        "selftrain_boxes.score_histogram",
    ):
        monkeypatch.setattr(f"sslzoo.tasks.{where}", lambda *_, **__: None)  # pictures take longer than these steps
    words = [*command(root, "steps=2"), "grid=fraction", "fractions=[0.5]", f"init={backbone}"]
    words.remove("label_fraction=0.5")
    run([*words, f"run_dir={tmp_path / 'whole'}"])

    def killed(commands, logs, jobs, tick):
        first = dict(list(commands.items())[:1])
        in_this_process(first, logs, jobs, tick)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(selftrain_grid, "together", killed)
        with pytest.raises(Killed):
            run([*words, f"run_dir={tmp_path / 'broken'}"])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("broken/cells/*/*/last.ckpt")}
    assert len(times) == 3
    run([f"resume={tmp_path / 'broken'}"])
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(list(tmp_path.glob("broken/cells/*/*/last.ckpt"))) == 6  # two teachers, students, controls
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text()
    assert (tmp_path / "broken" / "figure.png").is_file()
    table = (tmp_path / "whole" / "table.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[2:9] == [
        *("random", "random + self-training", "random, control of as many images", "moco", "moco + self-training"),
        *("moco, control of as many images", "moco - random"),
    ]


def test_cells_of_other_images_are_refused_and_moved_ones_are_not(tmp_path, monkeypatch, capsys, root, backbone):
    asked = []
    monkeypatch.setattr(selftrain_grid, "together", lambda commands, *_: asked.append(commands) or {})
    words = [*command(root), "grid=fraction", "fractions=[0.5]", f"init={backbone}", f"cells={tmp_path / 'cells'}"]
    words.remove("label_fraction=0.5")
    first = run([*words, f"run_dir={tmp_path / 'first'}"])
    for folder in map(Path, first["cells"].values()):
        folder.mkdir(parents=True)
        place = composed([word for word in words if not word.startswith(("grid", "fractions", "cells", "init"))])
        OmegaConf.save(place, folder / "config.yaml")
    moved = tmp_path / "moved"
    copytree(root, moved)
    elsewhere = [word.replace(str(root), str(moved)) for word in words]
    assert main([*elsewhere, f"run_dir={tmp_path / 'second'}"]) == 2
    said = capsys.readouterr().err
    assert f"was made with data.root={root}, and this grid has data.root={moved}" in said
    assert not (tmp_path / "second").exists()
    assert main([*words, f"run_dir={tmp_path / 'second'}"]) == 0
    assert main([f"resume={tmp_path / 'first'}", f"data.root={moved}", "task.also=[val2017]", "data.workers=3"]) == 0
    assert len(asked[-1]) == 2
    for typed in asked[-1].values():  # of what they had, the rest is as it was
        assert {f"data.root={moved}", 'task.also=["val2017"]', "data.workers=3"} <= set(typed)


def test_backbones_of_one_method_are_told_apart(tmp_path, backbone):
    files = [tmp_path / top / "moco" / "backbone.safetensors" for top in "abc"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(backbone.read_bytes())
    listed = ",".join(map(str, files))
    named = selftrain_grid.inits(composed(["task=selftrain", "encoder.width=0.125", "grid=init", f"init=[{listed}]"]))
    assert list(named.values()) == ["random", "moco", "moco moco", "moco c/moco"]


def planned(*typed: str):
    config = composed(["task=selftrain", "encoder.width=0.125", *typed])
    named = selftrain_grid.inits(config)
    grid = selftrain_grid.layout(config, named)
    return grid, selftrain_grid.places(config, grid, named)


def test_grids_have_the_papers_rows_and_columns_and_share_their_cells(backbone):
    grid, cells = planned("grid=fraction", f"init={backbone}", "seeds=[0,1]")
    assert [row.name for row in grid.rows] == ["random", "random + self-training", "moco", "moco + self-training"]
    assert [column.name for column in grid.columns] == ["20%", "50%", "100%"]
    assert len(cells) == 2 * 3 * 2  # the teacher of a row with self-training is the row without it
    assert all(cells.values())
    grid, cells = planned("grid=augment", f"init={backbone}", "label_fraction=0.5")
    assert [row.name for row in grid.rows] == ["random", "moco", "random + self-training"]
    assert [column.name for column in grid.columns] == ["S1", "S2", "S3", "S4"]
    assert {column.label_fraction for column in grid.columns} == {0.5}
    assert sum(cells.values()) == 4
    grid, cells = planned("grid=init", f"init=[{backbone}]", "augment=s4")
    assert [row.name for row in grid.rows] == ["random", "moco", "random + self-training"]
    assert (len(grid.columns), len(cells)) == (1, 2)
    grid, cells = planned("grid=joint", f"init={backbone}", "label_fraction=0.2", "task.joint.data=photos")
    assert [row.name for row in grid.rows] == ["random", "random + self-training", "moco", "moco + self-training"]
    assert [column.name for column in grid.columns] == ["boxes alone", "jointly"]
    for place, trains in cells.items():
        words = selftrain_grid.cell_words(place, trains, ["task=selftrain", "task.joint.data=photos"])
        assert composed(words).task.joint.data == ("photos" if place.column.joint else None)


def test_only_cells_that_compute_the_same_share_a_folder(backbone):
    _, cells = planned("grid=fraction", f"init={backbone}")
    names = set()
    for more in ([], ["steps=100"], ["jobs=7"]):
        for place, trains in cells.items():
            config = composed(selftrain_grid.cell_words(place, trains, ["task=selftrain", *more]))
            names.add(selftrain_grid.name_of(place, config))
    assert len(names) == 2 * len(cells)


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["threshold=2"], "threshold=2 is neither a score from 0 to 1 nor match-density"),
        (["threshold=high"], "threshold=high is neither"),
        (["init=none.safetensors"], "backbone=none.safetensors is no file"),
        (["init=[random,imagenet]"], "outside of grid= give one"),
        (["augment=s9"], "augment=s9"),
        (["label_fraction=0"], "label_fraction=0"),
        (["label_fraction=1.0"], "has no unlabelled images"),
        (["alpha=-1"], "alpha=-1"),
        (["steps=0"], "steps=0 is no whole number of 1 or more"),
        (["growth=-1"], "growth=-1 is no number of 0 or more"),
        (["unlabelled_images=3"], "data.batch_size=4 is more than the 3 images left to label"),
        (["unlabelled_images=some"], "unlabelled_images=some is no whole number of 1 or more"),
        (["self_training=maybe"], "self_training=maybe is neither true nor false"),
        (["task.also=[night2017]"], "task.also=night2017 needs"),
        (["task.also=night2017"], "task.also=night2017 is no list of held-out parts"),
        (["task.metric=foo"], "task.metric=foo is none of coco"),
        (["task.clip=far"], "task.clip=far is no norm of gradients"),
        (["task.optim.name=foo"], "foo"),
        (["teacher=ema"], "teacher=ema is neither null nor settings of a moving teacher, decay, burn_in, threshold"),
        (["teacher={decay:1.0}"], "a moving teacher's decay=1.0 is no number from 0 to below 1"),
        (["task.teacher={decay:0.9}"], "type teacher= instead"),
        (["task.joint.data=scenes"], "task.joint.data=scenes is no set of images with classes"),
        (["grid=joint", "init=timm/resnet18"], "name images with classes, task.joint.data=photos"),
        (["data.batch_size=21"], "data.batch_size=21 is more than the 20 training images"),
        (["data.label_fraction=0.2"], "type label_fraction= instead"),
        (["trainer.max_steps=9"], "type steps= instead"),
        (["optim.lr=1"], "for task=selftrain type task.optim.*"),
        (["task.model=yolo"], "task.model=yolo is none of"),
        (["grid=fraction"], "set init= to imagenet or a backbone.safetensors"),
        (["grid=table"], "grid=table is none of fraction, augment, init"),
        (["grid=augment", "init=timm/resnet18"], "is another network than init=random"),
        (["grid=fraction", "fractions=[0.5,0.5]"], "is no list of different values"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_written(tmp_path, tmp_path_factory, capsys, words, message):
    root = tmp_path_factory.mktemp("fresh")
    write_coco(root, squares(root, "train", 40, 0), squares(root, "val", 6, 1))
    keys = {each.partition("=")[0] for each in words}
    kept = [each for each in command(root) if each.partition("=")[0] not in keys]
    assert main([*kept, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_at_hand_are_no_random_start(tmp_path, root, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    words = [*command(root), "init=imagenet", "imagenet=timm/resnet18.a1_in1k", "encoder=resnet18"]
    kept = [each for each in words if not each.startswith("encoder.width")]
    assert main([*kept, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "whose weights are not in the local cache" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
