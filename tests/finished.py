"""Run directories as finished runs leave them, without the runs."""

import json
from pathlib import Path

import yaml
from PIL import Image

VERSIONS = {"sslzoo": "0.1.0", "torch": "2.15.0"}
CONFIG = {
    "seed": 0,
    "image_size": 8,
    "monitor": {"k": 20, "temperature": 0.07, "bank": 10000, "queries": 2000},
    "task": {"name": "pretrain"},
    "data": {"name": "photos", "root": None, "batch_size": 4, "train_size": 24, "val_size": 12, "size": 8},
    "encoder": {"name": "resnet10t", "stem": "small", "width": 0.25, "options": {}},
    "optim": {"lr": 0.1},
    "trainer": {"max_epochs": 2},
}


def merged(config: dict, changes: dict) -> dict:
    """``config`` with dotted ``changes``."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        node = config
        *path, name = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    return config


def write_run(folder: Path, summary: dict, changes: dict) -> Path:
    """A run directory with a summary and a config."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"versions": VERSIONS, **summary}))
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(CONFIG, changes)))
    return folder


def pretrained(folder: Path, method="moco", seed=0, knn=0.6, start=0.5, raw=0.4, summary=(), **changes) -> Path:
    """A finished training run, with its curves and its picture of neighbours; ``changes`` with __ for dots."""
    told = {
        "task": "pretrain",
        "method": method,
        "data": "photos",
        "steps": 12,
        "epochs": 2.0,
        "seconds": 3.0,
        "images_per_second": 100.0,
        "loss": 1.5,
        "knn_top1": knn,
        "knn_top1_raw_pixels": raw,
        "knn_top1_random_init": start,
        "knn_k": 20,
        "knn_temperature": 0.07,
        "feature_std": 0.7,
        "rank_me": 30.0,
        "backbone": str(folder / "backbone.safetensors"),
        "seed": seed,
        "config_hash": f"hash{seed}",
        "command": f"python -m sslzoo method={method} seed={seed}",
    }
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    write_run(folder, told | dict(summary), {"seed": seed, "recipe": method, "run_dir": str(folder)} | dotted)
    rows = ["step,epoch,loss,feature_std,rank_me,knn_top1", f"6,0,2.5,0.6,20.0,{start}", f"12,1,1.5,0.7,30.0,{knn}"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    Image.new("RGB", (20, 10), "red").save(folder / "neighbours.png")
    return folder


def evaluated(folder: Path, backbone: Path | str, task="linear", seed=0, method="moco", scores=(), **changes) -> Path:
    """A finished evaluation of the backbone in a run directory, or of ``random`` or ``timm/NAME``."""
    name = str(backbone / "backbone.safetensors") if isinstance(backbone, Path) else backbone
    told = {"task": task, "method": method, "data": "photos", "backbone": name, "seed": seed, "seconds": 1.0}
    dotted = {"task": {"name": task}} | {key.replace("__", "."): value for key, value in changes.items()}
    return write_run(folder, told | dict(scores), {"seed": seed, "backbone": name} | dotted)
