"""task=knn from end to end: its grid, its interval, and one line for each mistake."""

import json

import numpy as np
import pytest

import sslzoo
from sslzoo.__main__ import main, run
from sslzoo.data.images import load
from sslzoo.downstream.features import features
from sslzoo.downstream.interval import interval
from sslzoo.downstream.knn import knn_top1
from sslzoo.tasks.knn import vote
from sslzoo.views import Clean

SMALL = ["data.train_size=120", "data.val_size=40", "trainer.accelerator=cpu", "image_size=16", "encoder.width=0.125"]


def complaint(capsys, *arguments):
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "knn"
    return run_dir, run(["task=knn", "backbone=random", *SMALL, f"run_dir={run_dir}"])


def test_headline_and_grid_are_single_votes(finished):
    run_dir, summary = finished
    assert json.loads((run_dir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    ks, temperatures = (1, 5, 10, 20, 50, 100), (0.03, 0.07, 0.1)  # 200 neighbours are more than there are images
    assert set(summary["knn_grid"]) == {f"k={k},T={t}" for k in ks for t in temperatures}
    train, val = load("photos", train_size=120, val_size=40)
    sslzoo_config = ["scale=demo", *SMALL]
    encoder = encoder_of(sslzoo_config)
    clean = Clean(16, (0.5001, 0.3736, 0.3097), (0.3234, 0.2639, 0.2518))
    bank, queries = (features(encoder, images, clean)[0] for images in (train, val))
    for k in ks:
        for t in temperatures:
            assert summary["knn_grid"][f"k={k},T={t}"] == knn_top1(bank, train.labels, queries, val.labels, k, t)
    assert summary["knn_top1"] == summary["knn_grid"]["k=20,T=0.07"]
    assert (summary["knn_k"], summary["knn_temperature"]) == (20, 0.07)
    right = np.arange(40) < round(40 * summary["knn_top1"])
    assert summary["knn_top1_interval"] == pytest.approx(interval(right))
    assert summary["knn_top1"] <= summary["knn_top5"] <= 1


def encoder_of(overrides):
    import pytorch_lightning as pl

    from sslzoo.config import composed, plain

    pl.seed_everything(0, verbose=False)
    return sslzoo.load_backbone("random", encoder=plain(composed(overrides).encoder))


def test_the_headline_is_what_was_typed_and_joins_the_grid(tmp_path, finished):
    typed = ["task.k=7", "task.temperature=0.2", "task.grid_k=[1]", "task.grid_temperature=[0.07]"]
    summary = run(["task=knn", "backbone=random", *SMALL, *typed, f"run_dir={tmp_path / 'knn'}"])
    assert set(summary["knn_grid"]) == {f"k={k},T={t}" for k in (1, 7) for t in (0.07, 0.2)}
    assert summary["knn_top1"] == summary["knn_grid"]["k=7,T=0.2"]
    assert summary["knn_grid"]["k=1,T=0.07"] == finished[1]["knn_grid"]["k=1,T=0.07"]


def test_features_in_a_memory_map_or_without_a_cache_give_the_same(tmp_path, finished):
    for i, typed in enumerate((["task.cache=null"], [f"task.cache={tmp_path / 'cache'}", "task.cache_limit_mb=0"])):
        summary = run(["task=knn", "backbone=random", *SMALL, *typed, f"run_dir={tmp_path / str(i)}"])
        assert summary["knn_grid"] == finished[1]["knn_grid"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # training and held-out images


def test_a_part_of_the_labels_is_a_smaller_bank(tmp_path):
    typed = ["data.label_fraction=0.25", "task.k=5", f"run_dir={tmp_path / 'knn'}"]
    summary = run(["task=knn", "backbone=random", *SMALL, *typed])
    assert max(int(name[2:].partition(",")[0]) for name in summary["knn_grid"]) == 20


def test_a_vote_takes_features_of_any_length():
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((30, 4)).astype(np.float32), rng.standard_normal((9, 4)).astype(np.float32)
    labels, truth = np.arange(30) % 3, np.arange(9) % 3
    once, again = (vote(bank * s, labels, queries * s, truth, [3], [0.1])[3, 0.1] for s in (1, 2))
    assert np.array_equal(once, again)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["task.k=121"], "task.k=121 neighbours cannot be asked of the 120 labelled training images of photos"),
        (["task.k=0"], "set task.k to 1 ... 120"),
        (["task.temperature=0"], "must be above 0"),
        (["backbone=/nowhere.safetensors"], "/nowhere.safetensors is no file"),
        (["backbone=timm/vit_tiny_patch16_224", "pretrained=false"], "takes no images of image_size=16 pixels"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_nothing_is_written(capsys, monkeypatch, tmp_path, typed, told):
    monkeypatch.chdir(tmp_path)
    assert told in complaint(capsys, "task=knn", "backbone=random", *SMALL, *typed)
    assert not list(tmp_path.rglob("*.*"))


def archive(path, labels, val_labels):
    """Noise with such labels."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": value
        for split, known in (("train", labels), ("val", val_labels))
        for what, value in (
            ("images", rng.integers(0, 255, (len(known), 16, 16, 3), dtype=np.uint8)),
            ("labels", np.array(known)[:, None]),
        )
    }
    np.savez(path, **arrays)
    return ["data=npz", f"data.root={path}", "image_size=16", "encoder.width=0.125", "trainer.accelerator=cpu"]


@pytest.mark.parametrize("task", ["knn", "linear"])
@pytest.mark.parametrize(
    ("labels", "val_labels", "told"),
    [
        ([0] * 30, [0] * 5, "needs two classes or more"),
        ([0, 1] * 15, [0, 1, 2, 1], "val_labels has class 2, which train_labels lacks"),
    ],
)
def test_labels_that_cannot_be_learnt_are_one_line(capsys, monkeypatch, tmp_path, task, labels, val_labels, told):
    monkeypatch.chdir(tmp_path)
    data = archive(tmp_path / "set.npz", labels, val_labels)
    assert told in complaint(capsys, f"task={task}", "backbone=random", *data)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_images_without_labels_are_one_line(capsys, tmp_path, task):
    from PIL import Image

    for i in range(4):
        Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    line = complaint(capsys, f"task={task}", "backbone=random", "data=folder", f"data.root={tmp_path}", "image_size=16")
    assert f"task={task} needs labelled training and held-out images" in line


def test_classes_that_nothing_is_held_out_of_are_named_and_the_rest_is_measured(caplog, tmp_path):
    data = archive(tmp_path / "set.npz", [0, 1, 2] * 10, [0, 1] * 5)
    summary = run(["task=knn", "backbone=random", *data, "task.k=5", f"run_dir={tmp_path / 'knn'}"])
    assert 0 <= summary["knn_top1"] <= 1
    assert "npz has no held-out images of 1 class (2): nothing is measured there" in caplog.text


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_features_that_are_not_finite_are_one_line(capsys, tmp_path, task):
    from sslzoo.checkpoints.backbone import save_backbone

    encoder = encoder_of(["scale=demo", *SMALL])
    encoder.net.bn1.weight.data[0] = float("nan")
    about = {"method": "moco", "mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 16, "config_hash": ""}
    path = save_backbone(encoder, tmp_path / "backbone.safetensors", **about)
    typed = [f"backbone={path}", "data.train_size=120", "data.val_size=40", "trainer.accelerator=cpu"]
    assert main([f"task={task}", *typed, f"run_dir={tmp_path / task}"]) == 2
    assert "not finite" in capsys.readouterr().err.strip().splitlines()[-1]
