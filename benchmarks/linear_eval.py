"""kNN and linear accuracy of many backbones, one row each, from features computed once.

    python benchmarks/linear_eval.py --runs runs/zoo [--seed 0] [--out runs/linear_eval] [key=value ...]
    python benchmarks/linear_eval.py --heads [--rounds 5]

The first finds every backbone.safetensors below ``--runs``, with ``--seed`` those in folders of that name, adds an
encoder at random and raw pixels, and runs ``task=knn`` and ``task=linear`` (cached protocol, the last feature) on each;
further overrides are passed on, e.g. ``data=cifar10``. Each evaluation is kept below ``--out``, named by weights and
overrides, and not repeated. Prints a markdown table; intervals are 95 % bootstraps over the held-out images.

The second times a training step of ``task=linear task.protocol=paper`` with one classifier and with 13 rates of two
kinds of features and their twins, at the demo's size: CPU time, a ratio the median of the rounds' ratios.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sslzoo.__main__ import run as sslzoo
from sslzoo.checkpoints.backbone import load_backbone
from sslzoo.checkpoints.files import write_text
from sslzoo.config import build_encoder, composed
from sslzoo.data.module import clean_batches
from sslzoo.downstream.cache import weights_hash
from sslzoo.downstream.features import check_size
from sslzoo.downstream.interval import interval
from sslzoo.downstream.linear import Heads, cached
from sslzoo.method import Batch
from sslzoo.optim import Optim
from sslzoo.report.progress import console
from sslzoo.tasks.knn import vote
from sslzoo.tasks.runs import images
from timing import Seconds, header, interleaved, median, ratio

COLUMNS = ("backbone", "method", "kNN top-1", "linear top-1", "L2 strength", "seconds")


def backbones(runs: Path, seed: str = "*") -> dict[str, str]:
    """Label and ``backbone=`` of every run, e.g. ``moco/0``, and of the encoder at random."""
    files = sorted(runs.glob(f"**/{seed}/backbone.safetensors"))
    found = {"/".join(path.parent.parts[-2:]): str(path) for path in files}
    return {**found, "random": "random"}


def digest(*parts: object) -> str:
    """8 hex digits."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).hexdigest()


def kept(place: Path, make: Callable[[], dict]) -> dict:
    """The summary in ``place``, made now if it is not there; what an evaluation that broke off has left is removed."""
    path = place / "summary.json"
    if not path.is_file():
        shutil.rmtree(place, ignore_errors=True)
        write_summary(path, make())
    return json.loads(path.read_text())


def write_summary(path: Path, summary: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(summary, indent=2) + "\n")


def evaluated(label: str, backbone: str, out: Path, overrides: list[str]) -> tuple[dict, dict]:
    """Summaries of ``task=knn`` and ``task=linear`` of one backbone."""
    weights = "random" if backbone == "random" else weights_hash(load_backbone(backbone))
    place = out / f"{label.replace('/', '-')}-{digest(weights, overrides)}"
    tasks = {"knn": [], "linear": ["task.features=last"]}
    knn, linear = (
        kept(
            place / task,
            lambda task=task, more=more: sslzoo(
                [f"task={task}", f"backbone={backbone}", *more, *overrides, f"run_dir={place / task}"]
            ),
        )
        for task, more in tasks.items()
    )
    return knn, linear


def raw_pixels(out: Path, overrides: list[str]) -> tuple[dict, dict]:
    """The same of normalised pixels: what any feature has to beat."""

    def make() -> dict:
        began = time.perf_counter()
        config = composed(["task=linear", *overrides])
        knn = composed(["task=knn", *overrides]).task
        data = images(config)
        (z, y), (v, truth) = (
            (torch.cat([x.flatten(1) for x, _ in clean_batches(side, data.clean)]).numpy(), side.labels)
            for side in (data.train, data.val)
        )
        places = vote(z, y, v, truth, [knn.k], [knn.temperature])[knn.k, knn.temperature]
        middle = time.perf_counter()
        found = cached({"last": z}, y, {"last": v}, truth, list(config.task.strengths), config.task.selection)
        return {
            "method": "-",
            "knn_top1": float((places < 1).mean()),
            "knn_top1_interval": interval(places < 1),
            "linear_top1": float(found.top1.mean()),
            "linear_top1_interval": interval(found.top1),
            "lr": found.curve[found.chosen]["lr"],
            "seconds": [middle - began, time.perf_counter() - middle],
        }

    both = kept(out / f"pixels-{digest(overrides)}", make)
    return {**both, "seconds": both["seconds"][0]}, {**both, "seconds": both["seconds"][1]}


def row(label: str, knn: dict, linear: dict) -> list[str]:
    """One backbone's line of the table."""

    def percent(top1: float, ends: list[float]) -> str:
        return f"{100 * top1:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"

    return [
        label,
        knn["method"],
        percent(knn["knn_top1"], knn["knn_top1_interval"]),
        percent(linear["linear_top1"], linear["linear_top1_interval"]),
        f"{linear['lr']:g}",
        f"{knn['seconds'] + linear['seconds']:.0f}",
    ]


def table(rows: list[list[str]]) -> str:
    """Markdown, the best linear accuracy first."""
    order = sorted(rows, key=lambda cells: -float(cells[3].split()[0]))
    lines = [COLUMNS, ["---", "---", *["---:"] * (len(COLUMNS) - 2)], *order]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def head_steps(rounds: int) -> None:
    """How long a step takes with one classifier and with all of them, and print it."""
    config = composed(["task=linear"])
    task, size = config.task, config.image_size
    encoder = build_encoder(config)
    index = torch.arange(task.batch_size)
    x = torch.randn(task.batch_size, 3, size, size).to(memory_format=torch.channels_last)
    batch = Batch([x], index, index % 10)
    held = np.arange(task.batch_size) % 10 == 0
    sweeps = {
        "1 classifier": (["last"], [0.1], None),
        "13 rates x 2 kinds, with twins": (["last", "last4"], list(task.lrs), held),
    }

    def step(kinds: list[str], lrs: list[float], held: np.ndarray | None) -> Callable[[], Seconds]:
        heads = Heads(encoder, check_size(encoder, size, kinds), 10, lrs, Optim(lr=1.0), held)
        optimizer = heads.configure_optimizers()

        def clocked(laps: int = 3) -> Seconds:
            start = Seconds.now()
            for _ in range(laps):
                optimizer.zero_grad()
                heads.training_step(batch).backward()
                optimizer.step()
            return Seconds.now().since(start, laps)

        return clocked

    rows = {name: step(*sweep) for name, sweep in sweeps.items()}
    for each in rows.values():
        each()
    times = interleaved(rows, rounds)
    print(", ".join(f"{name} {value}" for name, value in header(["torch", "timm", "pytorch-lightning"]).items()))
    one = next(iter(sweeps))
    print(f"| a step of {task.batch_size} images of {size} px | CPU ms | ratio |\n| --- | ---: | ---: |")
    for name, values in times.items():
        print(f"| {name} | {1000 * median(values).cpu:.1f} | {ratio(values, times[one]).cpu:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--seed", default="*")
    parser.add_argument("--out", type=Path, default=Path("runs/linear_eval"))
    parser.add_argument("--heads", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    if arguments.heads:
        return head_steps(arguments.rounds)
    rows = []
    for label, backbone in backbones(arguments.runs, arguments.seed).items():
        rows.append(row(label, *evaluated(label, backbone, arguments.out, overrides)))
        console.print(" | ".join(rows[-1]), markup=False)
    rows.append(row("raw pixels", *raw_pixels(arguments.out, overrides)))
    write_text(arguments.out / "table.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
