"""task=segment: whole runs, their files, resuming, and what is refused before anything is written."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from boxed import rectangles, write_coco
from runs import checkpoint_of, killed_before
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.checkpoints import save_backbone
from sslzoo.config import composed, options, plain
from sslzoo.data.box_views import STRENGTHS
from sslzoo.data.boxes import load_boxes
from sslzoo.data.cityscapes import CLASSES
from sslzoo.downstream.segmentation import SCALES, score
from sslzoo.downstream.segmenters import MODELS
from sslzoo.optim import Optim
from sslzoo.report.csv_log import read_rows
from sslzoo.tasks.segment import BUILT, build_segmenter
from test_cityscapes import write_cityscapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in COCO's layout: 8 training and 3 held-out pictures."""
    root = tmp_path_factory.mktemp("coco")
    return write_coco(root, rectangles(root, "train", 8, 0), rectangles(root, "val", 3, 1))


def command(root, *more: str) -> list[str]:
    return [
        "task=segment", "backbone=random", "data=coco", f"data.root={root}", "data.batch_size=4", "data.workers=1",
        "encoder.width=0.125", "encoder.stem=imagenet", "task.size=48", "task.channels=8", "task.repeats=1",
        "trainer.max_epochs=3", "task.every_epochs=2", "trainer.accelerator=cpu", "trainer.precision=32-true",
        "monitor.log_every=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    run_dir = tmp_path_factory.mktemp("runs") / "segment"
    return run_dir, run(command(root, f"run_dir={run_dir}", "task.model=fpn", "task.save_maps=true"))


def test_a_run_leaves_its_scores_curves_pictures_and_class_maps(finished, root):
    run_dir, summary = finished
    files = {"config.yaml", "command.txt", "metrics.csv", "curves.png", "predictions.png", "last.ckpt", "maps"}
    assert files | {"summary.json"} == {path.name for path in run_dir.iterdir()}
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert (summary["task"], summary["method"], summary["model"]) == ("segment", "random", "fpn")
    assert (summary["steps"], summary["epochs"], summary["images_seen"]) == (6, 3, 24)
    assert summary["classes"] == 3
    rows = read_rows(run_dir / "metrics.csv")
    assert [row["step"] for row in rows if "miou" in row] == [4, 6]
    assert [row["miou"] for row in rows if "miou" in row][-1] == summary["miou"]
    assert [row["loss"] for row in rows if "loss" in row][-1] == summary["loss"]

    _, val = load_boxes("coco", root, masks=True)
    pictures = [Image.open(run_dir / "maps" / f"{image}.png") for image in val.image_ids]
    assert all(picture.mode == "P" for picture in pictures)
    scores = score(val, [torch.tensor(np.asarray(picture)) for picture in pictures])
    assert {name: summary[name] for name in scores} == scores


def test_a_run_killed_and_resumed_equals_an_unbroken_one(tmp_path, root, finished):
    unbroken, summary = finished
    run_dir = tmp_path / "broken"
    with killed_before(4):
        run(command(root, f"run_dir={run_dir}", "task.model=fpn", "task.save_maps=true", "checkpoint.steps=3"))
    resumed = run([f"resume={run_dir}"])
    one, other = (checkpoint_of(path)["state_dict"] for path in (unbroken, run_dir))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for key in ("loss", "miou", "pixel_accuracy", "iou", "steps", "epochs", "config_hash"):
        assert resumed[key] == summary[key], key
    for file in (unbroken / "maps").iterdir():
        assert (run_dir / "maps" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted({*MODELS} - {"fpn"}))
def test_every_model_runs_to_the_end_with_scales_and_mirrors(tmp_path, root, model):
    more = ["task.scales=[0.75,1.0]", "task.flip=true", "trainer.max_epochs=1", f"run_dir={tmp_path / 'run'}"]
    summary = run(command(root, f"task.model={model}", *more))
    assert 0 <= summary["miou"] <= 1
    assert summary["steps"] == 2


@pytest.mark.slow
def test_cityscapes_runs_to_the_end_with_19_classes(tmp_path):
    place = write_cityscapes(tmp_path / "cityscapes", train=4)
    kept = [word for word in command(place) if not word.startswith("data=")]
    more = ["data=cityscapes", "task.augment=own_scale", "trainer.max_epochs=1", f"run_dir={tmp_path / 'run'}"]
    summary = run([*kept, *more])
    assert (summary["data"], summary["classes"]) == ("cityscapes", 19)
    assert set(summary["iou"]) == set(CLASSES.values())


def test_what_maps_do_not_need_waits_for_no_gradient():
    vit = Encoder("vit_tiny_patch16_224", options={"img_size": 64, "depth": 4, "embed_dim": 24, "num_heads": 2})
    resnet = Encoder("resnet10t", width=0.125)
    for encoder, left_out in ((vit, {"norm.weight", "norm.bias"}), (resnet, set())):
        config = composed(["task=segment", "task.size=64", "task.model=fpn", "task.channels=8"])
        inside = build_segmenter(config, encoder, 3).encoder.net
        assert {name for name, p in inside.named_parameters() if not p.requires_grad} == left_out
        assert all(p.grad is None for p in inside.parameters())


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=photos"], "data=photos has no masks; choose one of data=coco, data=voc, data=scenes, data=cityscapes"),
        (["task.model=unet"], "task.model=unet is none of fcn, fcn_moco"),
        (["optim.lr=1"], "optim.lr=1 is pretraining's; for task=segment type task.optim.*"),
        (["backbone=null"], "task=segment needs backbone="),
        (["task.augment=flip"], "task.augment=flip is none of s1"),
        (["task.size=5000"], "task.size=5000 is not from 32 to 4096"),
        (["task.size=400", "task.augment=own_scale"], "task.augment=own_scale cuts out of images of at most"),
        (["task.every_epochs=0"], "task.every_epochs=0 is no number of epochs"),
        (["task.scales=[]"], "task.scales=[] are no scales"),
        (["task.scales=[0.5,-1]"], "task.scales=[0.5, -1] are no scales"),
        (["data.batch_size=64"], "data.batch_size=64 is more than the 8 training images"),
        (["data.batch_size=1", "task.model=deeplabv3"], "set data.batch_size to 2 or more"),
        (["trainer.accumulate_grad_batches=2"], "set trainer.accumulate_grad_batches=1"),
        (["data.label_fraction=0.01"], "data.label_fraction=0.01 of 8 images is none"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_written(tmp_path, root, capsys, words, message):
    run_dir = tmp_path / "run"
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in command(root) if word.partition("=")[0] not in keys]
    if words[0].startswith("data="):
        kept = [word for word in kept if not word.startswith("data.root")]
    assert main([*kept, *words, f"run_dir={run_dir}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not run_dir.exists()


def test_a_vit_has_no_stage_to_dilate(tmp_path, root, capsys):
    encoder = Encoder("vit_tiny_patch16_224", options={"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2})
    where = {"method": "moco_v3", "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 32, "config_hash": ""}
    path = save_backbone(encoder, tmp_path / "backbone.safetensors", **where)
    kept = [word for word in command(root) if not word.startswith("backbone")]
    run_dir = tmp_path / "run"
    assert main([*kept, f"backbone={path}", "task.model=fcn_moco", f"run_dir={run_dir}"]) == 2
    said = capsys.readouterr().err
    assert "task.model=fcn_moco dilates the last stage" in said
    assert said.count("\n") == 1
    assert not run_dir.exists()


# Protocols


def test_without_a_protocol_scenes_are_segmented_in_minutes():
    config = composed(["task=segment"])
    assert (config.data.name, config.data.batch_size, config.trainer.max_epochs) == ("scenes", 16, 8)
    assert set(BUILT) <= config.task.keys()
    assert SCALES == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize(
    ("name", "data", "steps", "size", "rate"),
    [("voc12_fcn", "voc", 30000, 513, 0.003), ("cityscapes_fcn", "cityscapes", 90000, 769, 0.01)],
)
def test_protocols_are_the_published_ones(name, data, steps, size, rate):
    config = composed([f"protocol={name}"])
    task = config.task
    assert (task.name, task.model, task.size, config.data.name) == ("segment", "fcn_moco", size, data)
    assert (config.trainer.max_steps, config.data.batch_size, config.encoder.name) == (steps, 16, "resnet50")
    assert STRENGTHS[task.augment] == ((0.5, 2.0), None, False)
    optim = Optim(**plain(task.optim) | {"batch_size": 16})
    assert (optim.weight_decay, optim.exclude) == (1e-4, "none")
    rates = [optim.lr_at(step, steps, 600) for step in range(steps)]
    assert rates[0] == pytest.approx(rate)
    drops = [step for step in range(1, steps) if rates[step] < 0.5 * rates[step - 1]]
    assert drops == pytest.approx([math.ceil(0.7 * steps), math.ceil(0.9 * steps)], abs=1)
    assert rates[-1] == pytest.approx(rate / 100)


def test_every_protocol_of_segmentation_is_tested():
    assert {name for name in options("protocol") if name.endswith("_fcn")} == {"voc12_fcn", "cityscapes_fcn"}
