"""Detection: batches that repeat, what is found in which image, whole runs, and what is refused."""

import json
import math
from shutil import copytree

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from boxed import IDS, loader, random_predictions, random_truth, rectangles, same, write_coco
from conftest import close
from runs import as_second_rank, checkpoint_of, counted, killed_before
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.checkpoints import save_backbone
from sslzoo.config import composed, config_hash, options, plain
from sslzoo.data.boxes import further, load_boxes
from sslzoo.downstream.average_precision import coco_scores
from sslzoo.downstream.detection import Detection, first_batches, predict, score
from sslzoo.downstream.detectors import build
from sslzoo.downstream.precise_bn import estimate_batchnorm
from sslzoo.errors import UserError
from sslzoo.optim import Optim
from sslzoo.report.csv_log import read_rows
from sslzoo.tasks import detect
from sslzoo.tasks.detect import BUILT, build_detector, load_sets

SMALL = {"channels": 16, "convs": 1, "norm": "group", "rois": 8, "proposals": 10}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in COCO's layout: 12 training and 6 held-out pictures."""
    root = tmp_path_factory.mktemp("coco")
    return write_coco(root, rectangles(root, "train", 12, 0), rectangles(root, "val", 6, 1))


@pytest.fixture(scope="module")
def sets(root):
    return load_boxes("coco", root)


def detector(model: str = "retinanet", **options) -> nn.Module:
    encoder = Encoder("resnet10t", width=0.125)
    return build(model, encoder, 2, [0.5] * 3, [0.25] * 3, min_size=64, max_size=64, **{**SMALL, **options})


# Training, finding, scoring


def test_the_loss_is_the_sum_of_the_detectors_losses(sets):
    module = Detection(detector())
    (batch, *_) = loader(sets, size=64)
    torch.manual_seed(0)
    parts = module.detector([image / 255 for image in batch.images], batch.targets)
    assert module.loss(batch).item() == pytest.approx(sum(loss.item() for loss in parts.values()), rel=1e-4)


def test_gradients_are_clipped_where_asked(sets):
    for clip in (None, 0.01):
        module = Detection(detector(), clip=clip)
        (batch, *_) = loader(sets, size=64)
        module.loss(batch).backward()
        module.before_step()
        norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
        assert norm > 0.1 if clip is None else norm <= 0.0101


def test_what_is_found_belongs_to_its_image_whatever_the_batch(sets):
    _, val = sets
    module = Detection(detector(score=0.0, detections=4))
    module.train()
    found = predict(module, val, batch_size=1)
    assert module.training
    assert len(found) == len(val)
    for i, each in enumerate(found):
        height, width = val.sizes[i].tolist()
        image = torch.from_numpy(val.picture(i)).permute(2, 0, 1) / 255
        (alone,) = module.detector.eval()([image])
        torch.testing.assert_close(each["boxes"], alone["boxes"])
        assert (each["boxes"] <= torch.tensor([width, height, width, height]) + 1e-4).all()


def test_scores_are_cocos_and_what_cannot_be_measured_is_left_out():
    rng = np.random.default_rng(0)
    truth = random_truth(rng, crowds=0.0)
    found = random_predictions(rng, truth)
    scores, all_of_them = score(truth, found), coco_scores(truth, found)
    assert scores == {name: value for name, value in all_of_them.items() if value >= 0}
    right = [{**truth.target(i), "scores": torch.ones(len(truth.target(i)["labels"]))} for i in range(len(truth))]
    for metric in ("coco", "voc07", "voc12"):
        perfect = score(truth, right, metric)
        assert perfect["map"] == perfect["map_50"] == perfect["map_75"] == pytest.approx(1.0)
        assert all(0 <= value <= 1 for value in perfect.values())


@pytest.mark.parametrize("images", [1, 4, 6, 17])
def test_first_batches_are_the_runs_own_and_leave_the_loader_alone(sets, images):
    whole = loader(sets, size=64)
    own = [*whole, *whole]
    count = -(-images // 4)
    assert same(list(first_batches(whole, images)), own[:count])
    assert whole.position == 6


def test_batchnorm_of_a_second_stage_is_estimated_on_the_same_regions_whatever_was_drawn_before(sets):
    module, own = Detection(detector("faster_rcnn_c4")), loader(sets, size=64)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        estimate_batchnorm(module, first_batches(own, 8))
        found.append(module.detector.roi_heads.box_head[1].running_var.clone())
    assert torch.equal(*found)
    assert (found[0] != 1).any()


# Whole runs


def command(root, *more: str) -> list[str]:
    return [
        "task=detect", "backbone=random", "data=coco", f"data.root={root}", "data.batch_size=4", "data.workers=1",
        "encoder.width=0.125", "encoder.stem=imagenet", "task.min_size=64", "task.max_size=64", "task.channels=16",
        "task.convs=1", "trainer.max_epochs=3", "task.every_epochs=2", "task.precise_bn=8", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "monitor.log_every=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    run_dir = tmp_path_factory.mktemp("runs") / "detect"
    return run_dir, run(command(root, f"run_dir={run_dir}", "task.score=0.0", "task.also=[val2017]"))


def test_a_run_leaves_its_scores_curves_pictures_and_results_with_their_own_ids(finished, sets):
    run_dir, summary = finished
    files = {"config.yaml", "command.txt", "metrics.csv", "curves.png", "predictions.png", "results.json", "last.ckpt"}
    assert files | {"summary.json"} == {path.name for path in run_dir.iterdir()}
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["task"] == "detect"
    assert summary["method"] == "random"
    assert (summary["steps"], summary["epochs"], summary["images_seen"]) == (9, 3, 36)
    assert all(0 <= summary[name] <= 1 for name in ("map", "map_50", "map_75", "mar_100"))
    assert summary["also"]["val2017"] == {name: summary[name] for name in summary["also"]["val2017"]}
    results = json.loads((run_dir / "results.json").read_text())
    assert summary["boxes_per_image"] == len(results) / 6
    assert {result["image_id"] for result in results} <= {1000 + 7 * i for i in range(6)}
    assert {result["category_id"] for result in results} <= set(IDS)
    rows = read_rows(run_dir / "metrics.csv")
    assert [row["step"] for row in rows if "map" in row] == [6, 9]
    assert [row["map"] for row in rows if "map" in row][-1] == summary["map"]
    assert [row["loss"] for row in rows if "loss" in row][-1] == summary["loss"]
    assert len([row for row in rows if "loss" in row]) == 9


def test_batchnorm_is_tested_with_the_statistics_of_the_first_training_images(finished, sets):
    run_dir, _ = finished
    weights = checkpoint_of(run_dir)["state_dict"]
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (composed(command("")).data[key] for key in ("mean", "std"))
    )
    pictures = [image for batch in list(loader(sets, size=64, seed=0))[:2] for image in batch.images]
    x = torch.stack([(image / 255 - mean) / std for image in pictures]).double()
    entered = nn.functional.conv2d(x, weights["encoder.net.conv1.weight"].double(), stride=2, padding=3)
    close(weights["encoder.net.bn1.running_mean"].double(), entered.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    close(weights["encoder.net.bn1.running_var"].double(), entered.var((0, 2, 3), correction=0), rtol=1e-5)


def test_a_run_killed_and_resumed_equals_an_unbroken_one(tmp_path, root, finished):
    unbroken, summary = finished
    run_dir = tmp_path / "broken"
    with killed_before(5):
        run(command(root, f"run_dir={run_dir}", "task.score=0.0", "checkpoint.steps=4"))
    resumed = run([f"resume={run_dir}"])
    one, other = (checkpoint_of(path)["state_dict"] for path in (unbroken, run_dir))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (run_dir / "results.json").read_text() == (unbroken / "results.json").read_text()
    for key in ("loss", "map", "map_50", "steps", "epochs", "config_hash"):
        assert resumed[key] == summary[key], key


def test_all_ranks_find_together_when_a_run_is_resumed_after_its_end(tmp_path, monkeypatch, finished):
    run_dir = copytree(finished[0], tmp_path / "again")
    calls = counted(monkeypatch, detect, "predict")
    as_second_rank(monkeypatch)
    assert run([f"resume={run_dir}"]) == {}
    assert len(calls) == 2  # the held-out images, and a further part


@pytest.mark.slow
def test_a_detector_learns_red_and_blue(tmp_path, root):
    options = ["trainer.max_epochs=25", "task.every_epochs=25", "task.augment=flip", "task.optim.lr=3e-3"]
    summary = run(command(root, *options, f"run_dir={tmp_path / 'run'}"))
    assert summary["map_50"] > 0.5


@pytest.mark.slow
def test_masks_and_soft_suppression_run_to_the_end(tmp_path, root):
    options = ["task.model=mask_rcnn_fpn", "task.nms=soft", "task.rois=8", "task.proposals=10", "trainer.max_epochs=1"]
    summary = run(command(root, *options, f"run_dir={tmp_path / 'run'}"))
    assert 0 <= summary["mask_map"] <= 1


def test_what_maps_do_not_need_waits_for_no_gradient():
    vit = Encoder("vit_tiny_patch16_224", options={"img_size": 64, "depth": 4, "embed_dim": 24, "num_heads": 2})
    resnet = Encoder("resnet10t", width=0.125)
    for encoder, model, left_out in ((vit, "retinanet", {"norm.weight", "norm.bias"}), (resnet, "mask_rcnn_c4", set())):
        config = composed(["task=detect", f"task.model={model}", "task.min_size=64", "task.channels=16"])
        inside = build_detector(config, encoder, 2).backbone.encoder.net
        assert {name for name, p in inside.named_parameters() if not p.requires_grad} == left_out
        assert all(p.grad is None for p in inside.parameters())


def test_batchnorm_shared_by_two_parents_is_synchronised_once():
    module = Detection(detector("faster_rcnn_c4"))
    module.other = nn.ModuleList([BatchNormAct2d(4)])
    module.again = module.other
    names = set(module.state_dict())
    synced = sync_batchnorm(module, torch.device("cuda"))
    assert set(synced.state_dict()) == names
    assert synced.again[0] is synced.other[0]
    assert synced.encoder.net.bn1 is synced.detector.backbone.encoder.net.bn1
    left = [name for name, part in synced.named_modules() if type(part) is nn.BatchNorm2d]
    assert not left


def test_images_without_boxes_are_left_out_where_asked(tmp_path):
    train = rectangles(tmp_path, "train", 8, 0)
    for annotation in train["annotations"]:
        if annotation["image_id"] == 1000:
            annotation["iscrowd"] = 1
    root = write_coco(tmp_path, train, rectangles(tmp_path, "val", 4, 1))
    for drop, wanted in ((False, range(8)), (True, (1, 2, 4, 5, 6))):
        config = composed([*command(root), f"task.drop_empty={drop}"])
        kept, val = load_sets(config, masks=False)
        assert kept.image_ids == [1000 + 7 * i for i in wanted]
        assert len(val) == 4


def test_further_held_out_parts_have_the_training_images_classes(sets, root):
    settings = {"name": "coco", "root": root, "class_agnostic": False, "on_error": "raise"}
    part = further(settings, "val2017", sets[0], masks=True)
    assert (part.classes, part.image_ids) == (sets[1].classes, sets[1].image_ids)
    assert len(part.segmentations) == len(part.labels) == len(sets[1].labels)
    assert further(settings | {"class_agnostic": True}, "val2017", sets[0].agnostic()).classes == ["object"]


def test_held_out_pictures_of_which_only_empty_ones_can_be_read_are_refused(tmp_path):
    root = write_coco(tmp_path, rectangles(tmp_path, "train", 8, 0), rectangles(tmp_path, "val", 4, 1))
    for image in (1000, 1007, 1014):  # 1021 has no boxes
        (root / "val2017" / f"{image}.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="have no boxes to score by"):
        load_sets(composed([*command(root), "data.on_error=skip"]), masks=False)


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=photos"], "data=photos has no boxes; choose one of data=coco, data=voc, data=scenes"),
        (["task.model=yolo"], "task.model=yolo is none of retinanet"),
        (["optim.lr=1"], "optim.lr=1 is pretraining's; for task=detect type task.optim.*"),
        (["backbone=null"], "task=detect needs backbone="),
        (["task.metric=lvis"], "task.metric=lvis is none of coco, voc07, voc12"),
        (["task.augment=s9"], "task.augment=s9 is none of"),
        (["task.precise_bn=-1"], "task.precise_bn=-1 is no number of images"),
        (["task.also=[night2017]"], "task.also=night2017 needs"),
        (["task.every_epochs=0"], "task.every_epochs=0 is no number of epochs"),
        (["data.batch_size=64"], "data.batch_size=64 is more than the 12 training images"),
        (["task.optim.schedule=none"], "optim.schedule=none is none of"),
        (["trainer.accumulate_grad_batches=2"], "set trainer.accumulate_grad_batches=1"),
        (["protocol=coco_9x"], "protocol=coco_9x does not exist: protocol is one of cityscapes_fcn, coco_c4_1x"),
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


def test_a_vit_is_no_c4_backbone(tmp_path, root, capsys):
    encoder = Encoder("vit_tiny_patch16_224", options={"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2})
    where = {"method": "moco_v3", "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 32, "config_hash": ""}
    path = save_backbone(encoder, tmp_path / "backbone.safetensors", **where)
    kept = [word for word in command(root) if not word.startswith("backbone")]
    assert main([*kept, f"backbone={path}", "task.model=faster_rcnn_c4"]) == 2
    assert "set task.model=faster_rcnn_fpn" in capsys.readouterr().err


# Protocols


def test_without_a_protocol_nothing_changes_and_detect_has_its_own():
    assert "protocol" not in composed([])
    assert config_hash(composed([])) == config_hash(composed(["data=photos"]))
    own = composed(["task=detect"])
    assert (own.data.name, own.data.batch_size) == ("scenes", 16)
    assert composed(["task=detect", "data=coco", "trainer.max_epochs=7"]).trainer.max_epochs == 7


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("voc0712_c4_24k", 16551),
        ("coco_c4_1x", 117266),  # of 118,287: the rest have no boxes
        ("coco_c4_2x", 117266),
        ("coco_fpn_1x", 117266),
        ("coco_fpn_2x", 117266),
    ],
)
def test_protocols_are_the_published_ones(name, images):
    config = composed([f"protocol={name}"])
    task, steps = config.task, config.trainer.max_steps
    assert config.task.name == "detect"
    assert set(BUILT) <= task.keys()
    assert steps == {"24k": 24000, "1x": 90000, "2x": 180000}[name.rpartition("_")[2]]
    assert (list(task.min_size)[-1], task.max_size, config.data.batch_size) == (800, 1333, 16)
    assert task.precise_bn == 200 * 16
    assert task.drop_empty == (images == 117266)
    optim = Optim(**plain(task.optim) | {"batch_size": 16})
    an_epoch, warmup = images // 16, 100 if images == 16551 else 1000
    rates = [optim.lr_at(step, steps, an_epoch) for step in range(steps)]
    assert rates[0] == pytest.approx(0.02 / 1000)
    assert rates[round(0.99 * warmup)] < 0.02
    assert rates[round(1.01 * warmup)] == pytest.approx(0.02)
    drops = [step for step in range(1, steps) if rates[step] < 0.5 * rates[step - 1]]
    wanted = (0.75 * steps, steps * 11 / 12) if images == 16551 else (steps * 2 / 3, steps * 8 / 9)
    assert drops == pytest.approx([math.ceil(step) for step in wanted], abs=1)
    assert rates[-1] == pytest.approx(0.0002)


def test_every_protocol_is_tested():
    own = {name for name in options("protocol") if name in options("task")}  # what a task takes if none is typed
    assert {"detect", "segment", "keypoints", "selftrain"} <= own
    here = {"voc0712_c4_24k", "coco_c4_1x", "coco_c4_2x", "coco_fpn_1x", "coco_fpn_2x"}
    elsewhere = {"voc12_fcn", "cityscapes_fcn", "coco_keypoints"}  # test_segment, test_keypoints
    assert {*options("protocol")} - own == here | elsewhere
