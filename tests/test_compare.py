"""``task=compare`` from the command line: three files, and one clear line for each mistake."""

import csv
import json

import pytest
import torch
from omegaconf import OmegaConf

from finished import evaluated, pretrained
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.checkpoints.backbone import save_backbone
from sslzoo.config import composed, config_hash

PHOTOS = ["data.train_size=40", "data.val_size=24", "image_size=16"]
MOVED = ["data=cifar10", "data.root=/nowhere", "image_size=16"]
VIT = {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3}


def compared(where, out, *more) -> dict:
    return run(["task=compare", f"runs={where}", f"run_dir={out}", "trainer.accelerator=cpu", *more])


def complaint(capsys, *arguments) -> str:
    """The one line a mistake is told in."""
    assert main(["task=compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def with_backbone(folder, encoder, config=PHOTOS):
    """Give a finished run a backbone, and the configuration that says what its images are."""
    told = {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 16, "config_hash": "-"}
    save_backbone(encoder, folder / "backbone.safetensors", method=folder.name, **told)
    whole = composed(["method=moco", *config])
    whole.encoder = OmegaConf.create(encoder.config)
    OmegaConf.save(whole, folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A ResNet and a ViT, evaluated; nothing was trained."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    small = Encoder("resnet10t", stem="small", width=0.125)
    moco = with_backbone(pretrained(folder / "moco", knn=0.6), small)
    with_backbone(pretrained(folder / "dino", "dino", knn=0.5), Encoder("vit_tiny_patch16_224", options=VIT))
    with_backbone(pretrained(folder / "byol", "byol", knn=0.4), small)
    evaluated(folder / "linear", moco, scores={"linear_top1": 0.7, "linear_top5": 0.9})
    return folder


@pytest.fixture(scope="module")
def made(zoo, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "compare"
    return out, compared(zoo, out, "task.max_maps=3", "task.images=20")


def test_it_leaves_a_table_twice_a_page_and_a_summary(made):
    out, summary = made
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "summary.json",
        "table.md",
        "table.csv",
        "report.html",
    }
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert "| moco |" in (out / "table.md").read_text()
    with (out / "table.csv").open() as file:
        assert {(line["method"], line["score"]) for line in csv.DictReader(file)} >= {
            ("moco", "linear_top1"),
            ("dino", "knn_top1"),
        }
    best = {(entry["task"], entry["score"]): entry["method"] for entry in summary["best"]}
    assert best["pretrain", "knn_top1"] == best["linear", "linear_top1"] == "moco"
    assert (summary["task"], len(summary["runs"]), summary["broken"], summary["unfinished"]) == ("compare", 4, [], [])


def test_the_page_has_maps_of_the_best_attention_of_the_vit_and_spectra_of_all(made):
    text = (made[0] / "report.html").read_text()
    for name in ("random init", "moco", "dino"):
        assert f'aria-label="map of {name}"' in text
    assert 'aria-label="map of byol"' not in text
    assert 'alt="attention of dino"' in text
    assert text.count('aria-label="spectrum"') == 3
    assert "task.max_maps=4 maps all" in text


def test_without_maps_neither_backbones_nor_data_are_touched(zoo, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("opened")

    for name in ("load_backbone", "images", "look"):
        monkeypatch.setattr(f"sslzoo.tasks.compare.{name}", refuse)
    compared(zoo, tmp_path / "out", "task.maps=false")
    text = (tmp_path / "out/report.html").read_text()
    assert "task.maps=false" in text
    assert 'aria-label="map of' not in text


def test_backbones_and_data_that_are_gone_are_noted_and_the_rest_is_mapped(zoo, tmp_path, capsys):
    small = Encoder("resnet10t", stem="small", width=0.125)
    pretrained(tmp_path / "runs/lost", "lost", knn=0.9)
    with_backbone(pretrained(tmp_path / "runs/moved", "moved", knn=0.8), small, MOVED)
    with_backbone(pretrained(tmp_path / "runs/kept", "kept", knn=0.7), small)
    summary = compared(tmp_path / "runs", tmp_path / "out", "task.images=10")
    lost, moved = sorted(summary["notes"])
    assert lost.startswith("no map of lost: ")
    assert "lost/backbone.safetensors is no file" in lost
    assert moved.startswith("no map of moved: ")
    assert "/nowhere" in moved
    text = (tmp_path / "out/report.html").read_text()
    assert 'aria-label="map of kept"' in text
    assert "no map of lost" in text


def test_broken_summaries_are_told_and_left_out(tmp_path, caplog):
    pretrained(tmp_path / "runs/moco")
    (tmp_path / "runs/cut").mkdir()
    (tmp_path / "runs/cut/summary.json").write_text("{")
    summary = compared(tmp_path / "runs", tmp_path / "out", "task.maps=false")
    assert "cut/summary.json is damaged" in summary["broken"][0]
    assert any("cut/summary.json is damaged" in line and line.endswith("left out") for line in caplog.messages)


def test_earlier_comparisons_below_are_no_runs(tmp_path):
    pretrained(tmp_path / "moco")
    compared(tmp_path, tmp_path / "compare/1", "task.maps=false")
    assert len(compared(tmp_path, tmp_path / "compare/2", "task.maps=false")["runs"]) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "task=compare needs runs="),
        (["runs=nowhere"], "runs=nowhere is no folder"),
        (["runs=nowhere/*/0"], "runs=nowhere/*/0 is no folder"),
        (["runs=empty"], "runs=empty has no summary.json below it"),
        (["runs=cut"], "cut/summary.json is damaged"),
        (["runs=scoreless"], "runs=scoreless has 1 summaries but no score in them"),
        (["runs=good", "task.max_maps=0"], "task.max_maps=0"),
        (["runs=good", "task.images=few"], "task.images=few"),
        (["runs=good", "task.maps=maybe"], "task.maps=maybe is neither true nor false"),
        (["runs=good", "task.map=false"], "task.map is no setting"),
        (["runs=good", "run_dir=good"], "run_dir=good exists and is not empty"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_nothing_is_written(capsys, monkeypatch, tmp_path, arguments, told):
    monkeypatch.chdir(tmp_path)
    pretrained(tmp_path / "good/moco")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/summary.json").write_text("{")
    evaluated(tmp_path / "scoreless/a", "random")
    before = sorted(tmp_path.rglob("*"))
    assert told in complaint(capsys, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_is_no_part_of_what_a_run_computes():
    config = composed(["method=moco"])
    before = config_hash(config)
    config.runs = "elsewhere"
    assert config_hash(config) == before
    del config.runs  # as in runs of before there was such a key
    assert config_hash(config) == before
