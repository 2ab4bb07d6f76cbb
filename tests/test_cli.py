"""The command line: what a run leaves, and one clear line for each mistake."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sslzoo
from sslzoo.__main__ import main, run
from sslzoo.config import composed, config_hash, options
from sslzoo.downstream.features import features
from sslzoo.errors import UserError

TINY = [
    "data.train_size=160",
    "data.val_size=32",
    "data.batch_size=32",
    "method.queue_size=64",
    "method.bn_groups=2",
    "encoder.name=resnet10t",
    "encoder.width=0.125",
    "image_size=16",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "monitor.k=5",
]


def complaint(capsys, *arguments):
    """The one line a mistake is told in."""
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sslzoo: ")
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "moco"
    return run_dir, run(["method=moco", *TINY, f"run_dir={run_dir}"])


CONTRACT = {
    *("task", "method", "data", "steps", "epochs", "seconds", "images_per_second", "loss", "knn_top1"),
    *("feature_std", "rank_me", "peak_memory_mb", "backbone"),
}


def test_a_run_leaves_what_the_contract_names(finished):
    run_dir, summary = finished
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "summary.json", "curves.png", "last.ckpt", "backbone.safetensors"}
    assert not [name for name in names if "partial" in name]
    assert json.loads((run_dir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert set(summary) >= CONTRACT
    assert (summary["steps"], summary["epochs"], summary["data"]) == (5, 1, "photos")
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"step", "epoch", "loss", "lr", "images_per_second", "knn_top1", "feature_std", "rank_me"} <= set(rows[0])


def test_pictures_have_content(finished):
    for name in ("curves.png", "neighbours.png"):
        with Image.open(finished[0] / name) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("L").getcolors()) > 50


def test_the_command_that_made_a_run_is_written_down(finished):
    words = (finished[0] / "command.txt").read_text()
    assert words.startswith("python -m sslzoo method=moco data.train_size=160")


def test_load_backbone_gives_the_trained_encoder(finished):
    run_dir, _ = finished
    encoder = sslzoo.load_backbone(run_dir / "backbone.safetensors")
    assert not encoder.training
    weights = torch.load(run_dir / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in encoder.net.state_dict().items():
        assert torch.equal(value, weights[f"encoder.net.{name}"]), name
    assert encoder.metadata["method"] == "moco"
    assert encoder.metadata["image_size"] == 16
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, encoder.dim)


def test_knn_task_repeats_the_runs_own_score(finished, tmp_path):
    run_dir, summary = finished
    backbone = f"backbone={run_dir / 'backbone.safetensors'}"
    data = ["data.train_size=160", "data.val_size=32", "task.k=5", "trainer.accelerator=cpu"]
    scores = run(["task=knn", backbone, *data, f"run_dir={tmp_path / 'knn'}"])
    assert scores["knn_top1"] == summary["knn_top1"]
    assert scores["rank_me"] == pytest.approx(summary["rank_me"], rel=1e-4)
    assert json.loads((tmp_path / "knn" / "summary.json").read_text())["method"] == "moco"


@pytest.mark.parametrize("backbone", ["random", "timm/resnet10t"])
def test_knn_task_on_backbones_from_elsewhere(tmp_path, backbone):
    data = ["data.train_size=64", "data.val_size=32", "task.k=5", "pretrained=false", "trainer.accelerator=cpu"]
    scores = run(["task=knn", f"backbone={backbone}", *data, f"run_dir={tmp_path / 'knn'}"])
    assert 0 < scores["knn_top1"] < 1
    assert scores["pretrained"] is False


def test_a_finished_run_is_never_overwritten(capsys, finished):
    assert "is not empty" in complaint(capsys, "method=moco", *TINY, f"run_dir={finished[0]}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["method=mocco"], ["method=mocco does not exist", "moco_v2", "did you mean moco?"]),
        (["data=cifra10"], ["data=cifra10 does not exist", "did you mean cifar10?"]),
        (["method.tempreature=1"], ["method.tempreature is no setting", "temperature"]),
        (["optim.lr=fast"], ["optim.lr=fast"]),
        (["moco"], ["'moco' is no override", "key=value"]),
        (["encoder.name=resnet51"], ["encoder.name=resnet51 is no timm model", "resnet50"]),
        (["encoder.stem=big"], ["encoder.stem=big"]),
        (["data.batch_size=100000"], ["data.batch_size=100000 is larger than photos"]),
        (["method.queue_size=9000"], ["queue_size is 9000 but photos has 8192", "at most 8192"]),
        (["method.bn_groups=7"], ["method.bn_groups=7 does not split a batch of 256"]),
        (["data=folder"], ["data.root"]),
        (["data=folder", "data.root=/nowhere"], ["/nowhere"]),
        (["data=cifar10", "data.root=/nowhere"], ["/nowhere", "data.download=true"]),
        (["run_dir=/proc/moco"], ["run_dir=/proc/moco cannot be written"]),
        (["task=knn"], ["task=knn needs backbone="]),
        (["task=knn", "backbone=/nowhere.safetensors"], ["/nowhere.safetensors is no file"]),
        (["task=knn", "backbone=timm/resnet51"], ["resnet51 is no timm model"]),
        (["trainer.precision=8"], ["trainer.precision=8"]),
        (["data.on_error=ignore"], ["data.on_error=ignore"]),
        (["views.full.flip=2"], ["flip"]),
    ],
)
def test_a_mistake_gets_one_clear_line_and_nothing_is_written(capsys, monkeypatch, tmp_path, arguments, told):
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, *arguments)
    for words in told:
        assert words in line
    assert not list(tmp_path.rglob("*.*"))


def test_an_empty_folder_is_named(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in complaint(capsys, "data=folder", f"data.root={tmp_path / 'empty'}")


def test_a_foreign_safetensors_file_is_refused(capsys, tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "was not written by sslzoo" in complaint(capsys, "task=knn", f"backbone={tmp_path / 'other.safetensors'}")
    (tmp_path / "text.safetensors").write_text("hello")
    assert "is no safetensors file" in complaint(capsys, "task=knn", f"backbone={tmp_path / 'text.safetensors'}")


def images_on_disk(root, broken=False):
    """Two classes of images of several sizes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for label in ("light", "dark"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                low, high = (120, 256) if label == "light" else (0, 130)
                pixels = generator.integers(low, high, (20 + i, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    if broken:
        (root / "train" / "dark" / "3.png").write_bytes(b"\x89PNG broken")
    return root


FOLDER = [part for part in TINY if "_size=1" not in part and "val_size" not in part and "data." not in part]


def test_training_on_a_folder_of_images_of_many_sizes(tmp_path):
    root = images_on_disk(tmp_path / "set")
    options = ["data=folder", f"data.root={root}", "data.batch_size=16", "method.queue_size=32", "image_size=16"]
    summary = run([*FOLDER, *options, f"run_dir={tmp_path / 'run'}"])
    assert summary["steps"] == 2
    assert summary["knn_top1"] is not None


def test_a_corrupt_image_stops_the_run_or_is_skipped_and_counted(capsys, tmp_path):
    root = images_on_disk(tmp_path / "set", broken=True)
    options = ["data=folder", f"data.root={root}", "data.batch_size=16", "method.queue_size=32", "image_size=16"]
    assert main([*FOLDER, *options, f"run_dir={tmp_path / 'run'}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3.png" in line
    assert "data.on_error=skip" in line
    summary = run([*FOLDER, *options, "data.on_error=skip", f"run_dir={tmp_path / 'skipping'}"])
    assert summary["skipped_images"] == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_loggers_write_beside_metrics_csv(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = ["logger.offline=true"] if name == "wandb" else []
    run(["method=moco", *TINY, f"logger={name}", *more, f"run_dir={tmp_path / name}"])
    pattern = "events.out.tfevents*" if name == "tensorboard" else "wandb/offline-run-*"
    assert list((tmp_path / name).glob(pattern))
    assert (tmp_path / name / "metrics.csv").is_file()


def test_every_recipe_composes_at_every_scale():
    for method in options("method"):
        for scale in options("scale"):
            config = composed([f"method={method}", f"scale={scale}"])
            assert config.recipe == method
            assert len(config_hash(config)) == 12


def test_recipes_open_with_paper_hardware_and_target():
    from sslzoo.config import CONF

    for path in (CONF / "method").glob("*.yaml"):
        head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
        for word in ("arXiv", "hardware", "epochs", "target"):
            assert word in head, f"{path.name} does not name its {word}"


def test_what_was_typed_wins_over_what_is_tuned():
    assert composed(["method=moco"]).method.queue_size == 2048
    config = composed(["method=moco", "method.queue_size=77", "views=moco_v2"])
    assert config.method.queue_size == 77
    assert config.views.full.blur is not None


def test_config_hash_ignores_where_a_run_is_but_not_what_it_computes():
    base = config_hash(composed(["method=moco"]))
    assert config_hash(composed(["method=moco", "run_dir=/tmp/x", "data.workers=3", "trainer.devices=2"])) == base
    assert config_hash(composed(["method=moco", "seed=1"])) != base


def test_a_sweep_runs_every_combination(monkeypatch):
    ran = []

    class Done:
        returncode = 0

    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(command[3:]) or Done)
    assert main(["-m", "method=moco,moco_v2", "seed=0,1"]) == 0
    assert ran == [[f"method={m}", f"seed={s}"] for m in ("moco", "moco_v2") for s in (0, 1)]


def test_help_names_every_choice(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(method in shown for method in options("method"))


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sslzoo.nonsense


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path):
    run_dir = tmp_path / "two"
    command = [sys.executable, "-m", "sslzoo", "method=moco", *TINY, "trainer.devices=2", f"run_dir={run_dir}"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["steps"] == 5


def test_features_leave_the_encoder_as_it_was(finished):
    from sslzoo.data.images import load
    from sslzoo.views import Clean

    encoder = sslzoo.load_backbone(finished[0] / "backbone.safetensors").train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    train, _ = load("photos", train_size=40, val_size=20)
    z, rows = features(encoder, train, Clean(16))
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    assert rows.tolist() == list(range(40))


def test_composition_errors_are_the_users():
    with pytest.raises(UserError):
        composed(["trainer.max_epochs=[unclosed"])
