"""Keypoints of objects: losses by slow formulas, missing points, ranks, places, whole runs, and what is refused."""

import json
import math
from shutil import copytree

import numpy as np
import pytest
import torch

from conftest import on_ranks
from pointed import faces, write_corners, write_faces
from runs import as_second_rank, checkpoint_of, counted, killed_before
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.config import composed
from sslzoo.data.box_module import BoxBatch
from sslzoo.data.point_sets import load_points
from sslzoo.data.points import clean_view, in_picture
from sslzoo.dist import all_mean
from sslzoo.downstream.keypoints import HeatMaps, Keypoints, Regression, build, gaussians, highest, predict
from sslzoo.errors import UserError
from sslzoo.optim import Optim
from sslzoo.report.csv_log import read_rows
from sslzoo.tasks import keypoints
from sslzoo.tasks.keypoints import BUILT, BUILT_RCNN, VIEW

MEAN, STD = [0.5] * 3, [0.25] * 3


def net(model: str = "heatmap", **options) -> Regression | HeatMaps:
    encoder = Encoder("resnet10t", stem="small", width=0.125)
    return build(model, encoder, 3, MEAN, STD, **{"deconvs": 1, "channels": 8, "sigma": 1.5, **options})


def random_points(count: int = 6, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = size * torch.rand(count, 3, 2, generator=generator).double() - 0.5
    return torch.cat([places, torch.randint(0, 3, (count, 3, 1), generator=generator)], 2)


def found_by(model: str, count: int = 6) -> torch.Tensor:
    shape = (count, 3, 2) if model == "regression" else (count, 3, 16, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)


# Losses


def slow_regression(found, points, size: int) -> float:
    errors = []
    for own, true in zip(found.tolist(), points.tolist(), strict=True):
        for (u, v), (x, y, labelled) in zip(own, true, strict=True):
            if labelled:  # (x - 48) / 48 in an image of 96 pixels, where x counts from the corner
                a, b = ((at + 0.5 - size / 2) / (size / 2) for at in (x, y))
                errors.append(((u - a) ** 2 + (v - b) ** 2) / 2)
    return sum(errors) / len(errors)


def slow_heatmap(found, points, size: int, sigma: float) -> float:
    side = found.shape[-1]
    errors = []
    for own, true in zip(found.tolist(), points.tolist(), strict=True):
        for rows, (x, y, labelled) in zip(own, true, strict=True):
            if not labelled:
                continue
            total = 0.0
            for i in range(side):
                for j in range(side):
                    a, b = (j + 0.5) * size / side - 0.5, (i + 0.5) * size / side - 0.5  # in pixels of the image
                    squared = ((a - x) ** 2 + (b - y) ** 2) / (size / side) ** 2
                    total += (rows[i][j] - math.exp(-squared / (2 * sigma**2))) ** 2
            errors.append(total / side**2)
    return sum(errors) / len(errors)


def test_losses_are_means_over_the_labelled_points_by_slow_formulas():
    points = random_points()
    assert 3 < (points[..., 2] > 0).sum() < 18
    found = found_by("regression")
    wanted = slow_regression(found, points, 32)
    assert net("regression").loss(found, points, 32).item() == pytest.approx(wanted, rel=1e-9)
    found = found_by("heatmap")
    wanted = slow_heatmap(found, points, 32, 1.5)
    assert net("heatmap").loss(found, points, 32).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("model", ["regression", "heatmap"])
def test_missing_points_give_no_gradient_whatever_stands_there(model):
    points = random_points()
    missing = points[..., 2] == 0
    gradients = []
    for value in (0.0, 7.0, 1e4):
        points[..., :2][missing] = value
        found = found_by(model).requires_grad_()
        net(model).loss(found, points, 32).backward()
        gradients.append(found.grad)
    assert (gradients[0][missing] == 0).all()
    assert (gradients[0][~missing].flatten(1).abs().sum(1) > 0).all()
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("model", ["regression", "heatmap"])
def test_a_batch_without_labelled_points_has_loss_zero_and_gradients_of_zero(model):
    module = Keypoints(net(model))
    batch = BoxBatch(
        [torch.zeros(3, 32, 32, dtype=torch.uint8)] * 2, [{"points": torch.zeros(3, 3)}] * 2, torch.arange(2)
    )
    loss = module.loss(batch)
    loss.backward()
    assert loss.item() == 0
    grads = [p.grad for name, p in module.named_parameters() if p.grad is not None]
    assert len(grads) > 10
    assert all((grad == 0).all() for grad in grads)


def _half(rank: int) -> list[tuple[float, torch.Tensor]]:
    mine, done = slice(3 * rank, 3 * rank + 3), []
    for model in ("regression", "heatmap"):
        points = random_points()
        points[:3, :2, 2] = 0
        found = found_by(model)[mine].clone().requires_grad_()
        loss = net(model).loss(found, points[mine], 32)
        loss.backward()
        done.append((all_mean(loss).item(), found.grad / 2))  # DDP's mean
    return done


def test_two_ranks_with_unlike_numbers_of_points_have_the_loss_and_gradient_of_one():
    halves = on_ranks(2, _half)
    for k, model in enumerate(("regression", "heatmap")):
        points = random_points()
        points[:3, :2, 2] = 0
        found = found_by(model).requires_grad_()
        loss = net(model).loss(found, points, 32)
        loss.backward()
        (one, first), (other, second) = (half[k] for half in halves)
        assert one == other == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(torch.cat([first, second]), found.grad, rtol=1e-12, atol=1e-15)


# Places


def test_what_is_learned_is_read_back_where_it_was():
    points = random_points(40)
    inner = points[..., :2].clamp(2, 28)
    points = torch.cat([inner, torch.ones(40, 3, 1, dtype=torch.double)], 2)
    regression, heatmap = net("regression"), net("heatmap")
    exact = (2 * inner + 1) / 32 - 1
    torch.testing.assert_close(regression.places(exact, 32), inner)
    assert regression.loss(exact, points, 32).item() == pytest.approx(0, abs=1e-12)
    drawn = gaussians(points, 32, 16, 1.5)
    error = (heatmap.places(drawn, 32) - inner).abs()
    assert error.max() <= 0.25 * 2 + 1e-9  # a quarter of a pixel of the map
    assert heatmap.loss(drawn, points, 32).item() == 0


def test_the_highest_pixel_moves_a_quarter_towards_its_higher_neighbour():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(5, 3, 6, 7))
    maps[0, 0, 0, 0] = maps[1, 1, 5, 6] = maps[2, 2, 3, 0] = 9  # corners and a border
    found = highest(torch.from_numpy(maps))
    for b in range(5):
        for k in range(3):
            own = maps[b, k]
            y, x = np.unravel_index(own.argmax(), own.shape)
            dx = np.sign(own[y, x + 1] - own[y, x - 1]) / 4 if 0 < x < 6 else 0
            dy = np.sign(own[y + 1, x] - own[y - 1, x]) / 4 if 0 < y < 5 else 0
            assert found[b, k].tolist() == [x + dx, y + dy]


def test_every_object_is_found_in_its_own_picture_whatever_the_batch(tmp_path):
    settings = {"name": "coco", "root": write_corners(tmp_path, 4, 6), "on_error": "raise", "label_fraction": 1.0}
    _, val = load_points(settings)
    module = Keypoints(net("regression"))
    found = predict(module, val, 32, batch_size=2)
    assert module.training
    torch.testing.assert_close(found, predict(module, val, 32, batch_size=64), rtol=1e-4, atol=1e-3)
    module.eval()
    with torch.no_grad():
        for i in (0, len(val) - 1):
            places = module.net.places(module.net(clean_view(val, i, 32)[None]), 32)
            torch.testing.assert_close(found[i], in_picture(val, np.array([i]), places, 32)[0], rtol=1e-4, atol=1e-3)


def test_settings_that_mean_nothing_are_refused():
    for options, message in (
        ({"deconvs": 0}, r"task\.deconvs=0 is none"),
        ({"channels": 0}, r"task\.channels=0 is none"),
        ({"sigma": 0.0}, r"task\.sigma=0\.0 draws no Gaussian"),
        ({"model": "yolo"}, r"task\.model=yolo is none of regression, heatmap"),
    ):
        with pytest.raises(UserError, match=message):
            net(**options)


# Whole runs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corners(tmp_path_factory.mktemp("coco"))


def command(root, *more: str) -> list[str]:
    return [
        "task=keypoints", "backbone=random", "data=coco", f"data.root={root}", "data.batch_size=6", "data.workers=1",
        "encoder.width=0.125", "task.size=24", "task.channels=8", "task.deconvs=1", "trainer.max_epochs=3",
        "task.every_epochs=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "monitor.log_every=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    run_dir = tmp_path_factory.mktemp("runs") / "keypoints"
    return run_dir, run(command(root, f"run_dir={run_dir}"))


def test_a_run_leaves_its_scores_curves_and_pictures(finished):
    run_dir, summary = finished
    files = {"config.yaml", "command.txt", "metrics.csv", "curves.png", "predictions.png", "last.ckpt", "summary.json"}
    assert files == {path.name for path in run_dir.iterdir()}
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert (summary["task"], summary["model"], summary["method"]) == ("keypoints", "heatmap", "random")
    assert (summary["steps"], summary["epochs"]) == (9, 3)
    assert (summary["train_images"], summary["val_objects"], summary["points"]) == (18, 10, 3)
    assert summary["scored_points"] == 3 * 10 - 2
    assert 0 < summary["nme"] < 3
    assert 0 <= summary["pck"] <= 1
    rows = read_rows(run_dir / "metrics.csv")
    assert [row["step"] for row in rows if "nme" in row] == [6, 9]
    assert [row["nme"] for row in rows if "nme" in row][-1] == summary["nme"]
    assert [row["loss"] for row in rows if "loss" in row][-1] == summary["loss"]


def test_a_run_killed_and_resumed_equals_an_unbroken_one(tmp_path, root, finished):
    unbroken, summary = finished
    run_dir = tmp_path / "broken"
    with killed_before(5):
        run(command(root, f"run_dir={run_dir}", "checkpoint.steps=4"))
    resumed = run([f"resume={run_dir}"])
    one, other = (checkpoint_of(path)["state_dict"] for path in (unbroken, run_dir))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for key in ("loss", "nme", "pck", "steps", "epochs", "config_hash"):
        assert resumed[key] == summary[key], key


def test_all_ranks_find_the_points_of_the_picture_together(tmp_path, monkeypatch, finished):
    run_dir = copytree(finished[0], tmp_path / "again")  # resumed after its end, so that it looks no more
    calls = counted(monkeypatch, keypoints, "predict")
    as_second_rank(monkeypatch)
    assert run([f"resume={run_dir}"]) == {}
    assert len(calls) == 1


def test_batchnorm_is_estimated_on_the_first_training_images_where_asked(tmp_path, monkeypatch, root):
    calls = counted(monkeypatch, keypoints, "estimate_batchnorm")
    more = ["task.precise_bn=12", "trainer.max_epochs=1", f"run_dir={tmp_path / 'run'}"]
    run(command(root, *more))
    ((module, batches),) = calls
    assert module.encoder.net.bn1.running_mean.abs().max() > 0
    assert next(batches, None) is None  # all of them were taken


def test_faces_train_by_regression(tmp_path):
    root = write_faces(tmp_path / "faces", faces(16))
    words = [word for word in command(root) if not word.startswith(("data=", "task.channels", "task.deconvs"))]
    options = ["data=faces", "task.model=regression", "task.normalise=interocular", f"run_dir={tmp_path / 'run'}"]
    summary = run([*words, *options])
    assert (summary["data"], summary["train_images"], summary["val_images"]) == ("faces", 12, 3)
    assert summary["skipped"] == {"without a point": 2}
    assert 0 < summary["nme"] < 10


def test_keypoint_rcnn_runs_to_the_end_with_its_results(tmp_path, root):
    small = ["task.rois=8", "task.proposals=10", "task.convs=1", "task.detections=3", "task.score=0.0"]
    sides = ["task.min_size=64", "task.max_size=64", "trainer.max_epochs=1", "encoder.stem=imagenet"]
    run_dir = tmp_path / "run"
    summary = run(command(root, "task.model=keypoint_rcnn", *small, *sides, f"run_dir={run_dir}"))
    assert 0 <= summary["oks_map"] <= 1
    assert 0 <= summary["found"] <= 1
    assert (summary["train_images"], summary["val_objects"]) == (9, 10)
    results = json.loads((run_dir / "results.json").read_text())
    assert all(len(result["keypoints"]) == 9 for result in results)
    assert (run_dir / "predictions.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["regression", "heatmap"])
def test_corners_are_learned(tmp_path, root, model):
    options = ["trainer.max_epochs=80", "task.every_epochs=80", "task.rotate=0", "task.optim.lr=3e-3"]
    finer = ["task.deconvs=2", "task.channels=16"]  # maps of 12 pixels for images of 24
    kept = [word for word in command(root) if not word.startswith(("task.deconvs", "task.channels"))]
    summary = run([*kept, f"task.model={model}", *options, *finer, f"run_dir={tmp_path / 'run'}"])
    assert summary["nme"] < 0.15


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=photos"], "data=photos has no keypoints; choose one of data=scenes, data=coco, data=faces"),
        (["task.model=yolo"], "task.model=yolo is none of regression, heatmap, keypoint_rcnn"),
        (["optim.lr=1"], "optim.lr=1 is pretraining's; for task=keypoints type task.optim.*"),
        (["backbone=null"], "task=keypoints needs backbone="),
        (["task.normalise=head"], "task.normalise=head is none of box, interocular, image"),
        (["task.normalise=interocular"], "task.normalise=interocular needs eyes"),
        (["task.precise_bn=-1"], "task.precise_bn=-1 is no number of images"),
        (["task.pck=0"], "task.pck=0 is no distance"),
        (["task.every_epochs=0"], "task.every_epochs=0 is no number of epochs"),
        (["data.batch_size=64"], "data.batch_size=64 is more than the 18 training images"),
        (["data.batch_size=1"], "data.batch_size=1 leaves nothing to BatchNorm"),
        (["task.scale=2"], "task.scale=2 is not from 0 to 0.9"),
        (["trainer.accumulate_grad_batches=2"], "set trainer.accumulate_grad_batches=1"),
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


# Protocols


def test_the_protocols_are_complete_and_cocos_the_published_one():
    demo = composed(["task=keypoints"])
    assert (demo.data.name, demo.data.batch_size) == ("scenes", 32)
    assert {*BUILT, *BUILT_RCNN, *VIEW} <= demo.task.keys()
    coco = composed(["protocol=coco_keypoints"])
    assert (coco.task.name, coco.task.model, coco.data.annotations) == (
        "keypoints",
        "keypoint_rcnn",
        "person_keypoints",
    )
    assert (coco.trainer.max_steps, coco.data.batch_size, list(coco.task.min_size)[-1]) == (180000, 16, 800)
    assert coco.task.precise_bn == 200 * 16
    optim = Optim(**{**coco.task.optim, "milestones": list(coco.task.optim.milestones), "batch_size": 16})
    steps = [optim.lr_at(step, 180000, 4000) for step in (0, 2000, 119999, 120001, 160001)]
    assert steps == pytest.approx([0.02 / 1000, 0.02, 0.02, 0.002, 0.0002])
