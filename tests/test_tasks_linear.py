"""task=linear from end to end: what it reports, how it goes on, and one line for each mistake."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from sslzoo.__main__ import main, run
from sslzoo.downstream.interval import interval

SMALL = [
    "task=linear",
    "backbone=random",
    "data.train_size=120",
    "data.val_size=40",
    "trainer.accelerator=cpu",
    "image_size=16",
    "encoder.width=0.125",
]
PAPER = [*SMALL, "task.protocol=paper", "task.epochs=2", "task.batch_size=32", "task.lrs=[0.1,3,30]"]
CONTRACT = {
    *("task", "method", "data", "linear_top1", "linear_top5", "linear_top1_interval", "lr", "lr_is", "lr_curve"),
    *("features", "protocol", "epochs", "seconds", "backbone", "weights", "seed", "config_hash", "versions", "command"),
}


@pytest.fixture(scope="module", params=["cached", "paper"])
def finished(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / request.param
    typed = {"cached": [*SMALL, "task.strengths=[1e-3,1e-2,1]", "task.features=[last,last4]"], "paper": PAPER}
    return run_dir, run([*typed[request.param], f"run_dir={run_dir}"])


def test_a_run_leaves_its_scores_its_curve_and_a_picture(finished):
    run_dir, summary = finished
    assert json.loads((run_dir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert set(summary) >= CONTRACT
    assert [row["features"] for row in summary["lr_curve"]] == ["last"] * 3 + ["last4"] * 3
    best = max(summary["lr_curve"], key=lambda row: row["selection_top1"])
    assert (summary["lr"], summary["features"]) == (best["lr"], best["features"])
    assert summary["linear_top1"] == best["val_top1"]
    assert summary["linear_top1"] <= summary["linear_top5"] <= 1
    assert summary["linear_top1_interval"] == pytest.approx(interval(np.arange(40) < 40 * best["val_top1"]))
    with Image.open(run_dir / "curves.png") as picture:
        assert len(picture.convert("L").getcolors()) > 50


def test_crops_leave_a_row_each_epoch(tmp_path, finished):
    run_dir, summary = finished
    if summary["protocol"] == "cached":
        assert not (run_dir / "metrics.csv").exists()
        return
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(0 < float(row["loss"]) < 3 and float(row["images_per_second"]) > 0 for row in rows)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    from sslzoo.tasks.linear import Epochs

    whole = run([*PAPER, f"run_dir={tmp_path / 'whole'}"])

    def broken(self, trainer, heads):
        if trainer.current_epoch == 1:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Epochs, "on_train_epoch_end", broken)
        with pytest.raises(RuntimeError):
            run([*PAPER, f"run_dir={tmp_path / 'half'}"])
    resumed = run([f"resume={tmp_path / 'half'}"])
    assert resumed["lr_curve"] == whole["lr_curve"]


def test_one_rate_is_scored_without_a_choice(tmp_path):
    summary = run([*SMALL, "task.strengths=[1e-2]", "task.selection=0.001", f"run_dir={tmp_path / 'one'}"])
    assert [row["selection_top1"] for row in summary["lr_curve"]] == [None]
    assert summary["lr"] == 1e-2


def test_a_part_of_the_labels_is_learnt_from(tmp_path):
    typed = ["data.label_fraction=0.25", "task.selection=0.34", "task.strengths=[1e-2,1]"]
    assert 0 <= run([*SMALL, *typed, f"run_dir={tmp_path / 'part'}"])["linear_top1"] <= 1


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["task.protocol=papers"], "task.protocol=papers is none of cached, paper"),
        (["task.features=[last,first]"], "task.features=first is none of last, last4"),
        (["task.strengths=[]"], "task.strengths=[] must be one or more numbers above 0"),
        (["task.protocol=paper", "task.lrs=[0.1,-1]"], "task.lrs=[0.1, -1] must be"),
        (["task.protocol=paper", "task.epochs=0"], "task.epochs=0 trains nothing"),
        (["task.protocol=paper", "task.batch_size=500"], "task.batch_size=500 does not fit photos with its 120"),
        (["task.protocol=paper", "task.schedule=linear"], "task.schedule=linear is none of cosine, step, constant"),
        (
            ["task.protocol=paper", "trainer.max_epochs=3"],
            "trainer.max_epochs=3 is pretraining's",
        ),
        (["task.protocol=paper", "optim.lr=3"], "type task.lrs"),
        (["task.selection=0.01"], "task.selection=0.01 of class 0 with its 12 training images is none or all"),
        (["task.momentun=0"], "task.momentun is no setting"),
        (["backbone=/nowhere.safetensors"], "/nowhere.safetensors is no file"),
        (["resume=/nowhere"], "/nowhere"),
        (["run_dir=/proc/linear"], "run_dir=/proc/linear cannot be written"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_nothing_is_written(capsys, monkeypatch, tmp_path, typed, told):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, *typed]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not list(tmp_path.rglob("*.*"))
