"""Self-training of segmenters: its parts, what they share, that they go on, what is refused."""

import numpy as np
import pytest
from PIL import Image

from boxed import rectangles, write_coco
from selftraining import PARTS, assert_parts, assert_resumes, summary_of
from sslzoo.__main__ import main, run
from sslzoo.config import composed, keys_of, options
from sslzoo.data.boxes import labelled_images
from sslzoo.downstream.segmenters import MODELS
from sslzoo.tasks.parts import own_settings
from sslzoo.tasks.selftrain_cell import part_words


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """16 training and 3 held-out pictures."""
    root = tmp_path_factory.mktemp("coco")
    return write_coco(root, rectangles(root, "train", 16, 0), rectangles(root, "val", 3, 1))


def command(root, *more: str) -> list[str]:
    """Half of the labels: 8 images."""
    return [
        "task=selftrain", "task.model=fpn", "data=coco", f"data.root={root}", "label_fraction=0.5", "threshold=0.4",
        "teacher_scales=[0.75,1.0]", "steps=4", "growth=0.0", "looks=1", "data.batch_size=4", "data.workers=1",
        "data.class_agnostic=false", "encoder.width=0.125", "encoder.stem=imagenet", "task.size=48", "task.channels=8",
        "trainer.accelerator=cpu", "trainer.precision=32-true", "monitor.log_every=1", "checkpoint.steps=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, run(command(root, f"run_dir={run_dir}"))


def test_a_run_has_a_teacher_pseudo_labels_a_student_and_a_control(finished):
    run_dir, summary = finished
    assert_parts(run_dir, summary, "miou", steps=4, images=16)
    assert {summary_of(run_dir / name)["train_images"] for name in PARTS} == {summary["labelled_images"]} == {8}


def test_the_teachers_maps_are_of_the_other_images_and_say_255_where_it_is_unsure(finished):
    run_dir, summary = finished
    learned = {1000 + 7 * i for i in labelled_images(16, 0.5).tolist()}
    files = list((run_dir / "pseudo" / "maps").iterdir())
    assert {int(file.stem) for file in files} <= {1000 + 7 * i for i in range(16)} - learned
    values = np.concatenate([np.asarray(Image.open(file)).ravel() for file in files])
    assert set(np.unique(values).tolist()) <= {0, 1, 2, 255}
    pseudo = summary["pseudo"]
    pixels = sum(pseudo["score_counts"])  # of all images; one that is wholly 255 has no file
    assert pseudo["labelled_pixels"] == pytest.approx((values != 255).sum() / pixels)
    assert pseudo["images_with_pixels"] == len(files) <= pseudo["images"]
    assert (pseudo["judged_images"], pseudo["images"]) == (len(files), 8)
    assert {path.name for path in (run_dir / "pseudo").iterdir()} == {"maps", "maps.png", "scores.png", "summary.json"}


@pytest.mark.slow
@pytest.mark.parametrize(("part", "step"), [("teacher", 2), ("student", 3)])
def test_a_run_killed_in_any_part_and_resumed_equals_an_unbroken_one(tmp_path, root, finished, part, step):
    assert_resumes(command(root), finished, tmp_path / "broken", part, step, "miou")


@pytest.mark.slow
def test_a_second_student_is_taught_by_the_first(tmp_path, root):
    run_dir = tmp_path / "twice"
    words = [each for each in command(root) if not each.startswith("steps")]
    summary = run([*words, "steps=2", "iterations=2", f"run_dir={run_dir}"])
    parts = ("teacher", "pseudo", "student", "pseudo_2", "student_2", "control")
    assert set(parts) <= {path.name for path in run_dir.iterdir()}
    assert summary["student"]["miou"] == summary_of(run_dir / "student_2")["miou"]
    assert summary["pseudo"] == summary_of(run_dir / "pseudo_2") != summary_of(run_dir / "pseudo")
    assert len({summary_of(run_dir / name)["start"] for name in ("teacher", "student", "student_2", "control")}) == 1


@pytest.mark.slow
def test_a_teacher_that_is_never_sure_gets_one_clear_line(tmp_path, root, capsys):
    run_dir = tmp_path / "unsure"
    words = [each for each in command(root) if not each.startswith(("threshold", "steps"))]
    assert main([*words, "threshold=1.0", "steps=1", f"run_dir={run_dir}"]) == 2
    said = capsys.readouterr().err
    assert "only 0 of 8 unlabelled images have a pixel of probability 1 or more" in said
    assert not (run_dir / "pseudo" / "summary.json").exists()
    assert not (run_dir / "student").exists()


@pytest.mark.parametrize("model", [*MODELS, "retinanet"])
def test_the_model_decides_whether_boxes_or_maps_are_learned(model):
    config = composed(["task=selftrain", f"task.model={model}"])
    assert config.trains == ("segment" if model in MODELS else "detect")
    assert (config.task.name, config.task.model, config.data.name) == ("selftrain", model, "scenes")
    for words in (["data=cityscapes", "data.root=/data"], ["protocol=voc12_fcn"], ["protocol=cityscapes_fcn"]):
        assert composed(["task=selftrain", *words]).trains == "segment"


@pytest.mark.parametrize("protocol", sorted({*options("protocol")} - {"coco_keypoints", "keypoints"}))
def test_every_protocol_takes_the_part_of_the_labels_that_was_typed(protocol):
    words = ["task=selftrain", f"protocol={protocol}", "label_fraction=0.2"]
    config = composed(words)
    assert config.data.label_fraction == 0.2
    part = composed(part_words(config, words, steps=10, images=100))
    assert part.data.label_fraction == 0.2
    assert part.task.name == config.trains


@pytest.mark.parametrize(("words", "agnostic"), [([], True), (["data=coco"], False), (["data=voc"], False)])
@pytest.mark.parametrize("model", ["retinanet", "deeplabv3"])
def test_only_the_built_in_scenes_are_learned_as_one_class_unasked(words, agnostic, model):
    words = ["task=selftrain", f"task.model={model}", *words]
    assert composed(words).data.class_agnostic is agnostic
    assert composed([*words, "data.class_agnostic=false"]).data.class_agnostic is False


def test_a_part_is_a_run_of_segmentation_with_the_settings_of_the_whole(tmp_path):
    typed = ["data=coco", "data.root=/data", "task.model=deeplabv3", "augment=s3", "alpha=0.5", "seed=3"]
    config = composed(["task=selftrain", *typed])
    words = part_words(config, typed, steps=300, images=400, pseudo=tmp_path)
    part, whole = keys_of(composed(words)), keys_of(config)
    own = {key for key in whole if key.partition(".")[0] in own_settings("selftrain_maps")}
    assert part.keys() == whole.keys() - own
    changed = {"task.name", "backbone", "task.every_epochs", "task.optim.warmup_epochs", "trainer.max_steps"}
    assert {key for key in part if part[key] != whole[key]} <= changed | {"task.pseudo"}
    assert (part["task.name"], part["task.pseudo"]) == ("segment", str(tmp_path / "maps"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["threshold=match-density"], "threshold=match-density is no probability"),
        (["teacher_scales=[]"], "teacher_scales=[] are no scales"),
        (["init=none.safetensors"], "backbone=none.safetensors is no file"),
        (["label_fraction=1.0"], "has no unlabelled images"),
        (["unlabelled_images=3"], "data.batch_size=4 is more than the 3 images left to label"),
        (["unlabelled_images=0"], "unlabelled_images=0 is no whole number of 1 or more"),
        (["teacher_scales=1.0"], "teacher_scales=1.0 are no scales"),
        (["teacher_flip=maybe"], "teacher_flip=maybe is neither true nor false"),
        (["task.optim.name=foo"], "foo"),
        (["data.batch_size=9"], "data.batch_size=9 is more than the 8 training images"),
        (["data.label_fraction=0.2"], "type label_fraction= instead"),
        (["task.augment=s2"], "type augment= instead"),
        (["task.size=7"], "task.size=7 is not from 32"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_written(tmp_path, root, capsys, words, message):
    keys = {each.partition("=")[0] for each in words}
    kept = [each for each in command(root) if each.partition("=")[0] not in keys]
    assert main([*kept, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
