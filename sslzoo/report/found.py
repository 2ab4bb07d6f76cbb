"""Finished runs on disk: their summaries, configurations and curves."""

import glob
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sslzoo.config import PLACE, config_hash, keys_of
from sslzoo.errors import UserError
from sslzoo.report.csv_log import read_rows

# Numbers in a summary that are no scores, by the ending of their names.
NO_SCORE = (
    *("seconds", "images_per_second", "epochs", "loss", "lr", "feature_std", "rank_me", "_mb", "temperature"),
    *("decay", "weight", "fraction", "momentum", "scale", "cost", "per_image", "pck_at"),
)
RAW, RANDOM = "_raw_pixels", "_random_init"  # endings of the baselines beside a score
OF_LABELS = "data.label_"  # which labels are learned from; pretraining learns from none


@dataclass(frozen=True)
class Run:
    """One run directory that has a ``summary.json``.

    Attributes:
        folder: the directory.
        summary: what the run reported.
        config: every leaf of its ``config.yaml`` by dotted key; empty where that file is gone.
    """

    folder: Path
    summary: dict
    config: dict[str, object]

    @property
    def task(self) -> str:
        return self.summary["task"]

    @property
    def method(self) -> str:
        return self.summary["method"]

    @property
    def seed(self) -> object:
        return self.summary.get("seed", self.config.get("seed"))

    @property
    def backbone(self) -> Path:
        """The backbone beside this summary."""
        return self.folder / "backbone.safetensors"

    @property
    def source(self) -> str:
        """The backbone that an evaluation speaks of: a path, ``random`` or ``timm/NAME``."""
        told = next(
            (self.summary[key] for key in ("initial_backbone", "backbone", "init") if key in self.summary), None
        )
        return str(self.config.get("imagenet", told) if told == "imagenet" else told)

    @property
    def source_folder(self) -> Path:
        return Path(self.source).parent

    @cached_property
    def rows(self) -> list[dict]:
        """The rows of ``metrics.csv``; none where it is gone or damaged."""
        try:
            return read_rows(self.folder / "metrics.csv")
        except (OSError, ValueError, AttributeError):
            return []

    @property
    def meant(self) -> dict[str, object]:
        """The settings without the seed, and without what this task does not look at."""
        unseen = OF_LABELS if self.task == "pretrain" else ()
        return {key: value for key, value in self.config.items() if key != "seed" and not key.startswith(unseen)}

    @cached_property
    def recipe(self) -> dict[str, object]:
        """The settings that decide what the run computes, without its seed."""
        return {key: value for key, value in self.meant.items() if not key.startswith(PLACE)} | self.root

    @property
    def root(self) -> dict[str, object]:
        """Where the images are, for sets that are told apart by nothing else."""
        needs = self.config.get("data.name") in ("folder", "imagenet", "npz", "coco", "voc", "cityscapes", "faces")
        return {"data.root": self.config.get("data.root")} if needs else {}

    @cached_property
    def hash(self) -> str:
        """Short hash of ``recipe``: that of a run's own summary, but equal for all its seeds."""
        if not self.config:
            return str(self.summary.get("config_hash", "-"))
        return config_hash(OmegaConf.create(self.meant))

    @property
    def scores(self) -> dict[str, float]:
        """Scores by name, without the baselines and intervals beside them."""
        return {
            key: value
            for key, value in self.summary.items()
            if isinstance(value, float) and math.isfinite(value) and not key.endswith((*NO_SCORE, RAW, RANDOM))
        }


@dataclass(frozen=True)
class Found:
    """What lies below a folder.

    Attributes:
        runs: those with a summary.
        broken: a line each on the summaries that cannot be read.
        unfinished: run directories without a summary.
    """

    runs: list[Run]
    broken: list[str]
    unfinished: list[Path]


def read(where: str | Path | None) -> Found:
    """Every run in a folder, or in the folders that a glob pattern names.

    Raises:
        UserError: if there is no such folder, or no summary below that can be read.
    """
    if where is None:
        raise UserError("task=compare needs runs=: a folder of runs or a pattern, e.g. runs=runs or runs='runs/moco/*'")
    pattern = str(Path(where).expanduser())
    tops = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))] if glob.has_magic(pattern) else []
    if not tops and not Path(pattern).is_dir():
        raise UserError(f"runs={where} is no folder; give one that holds runs, or a pattern in quotes")
    folders = sorted({path.parent for top in tops or [Path(pattern)] for path in _below(top)})
    folders = [folder for folder in folders if not _is_selftraining(folder.parent)]  # teachers and students: its parts
    runs, broken, unfinished = [], [], []
    for folder in folders:
        if not (folder / "summary.json").is_file():
            unfinished.append(folder)
            continue
        try:
            run = read_run(folder)
        except UserError as error:
            broken.append(str(error))
            continue
        if run.task != "compare" and "grid" not in run.summary:  # tables of other runs
            runs.append(run)
    if not runs:
        also = f"; {len(unfinished)} without one, e.g. {unfinished[0]}: not finished" if unfinished else ""
        raise UserError(broken[0] if broken else f"runs={where} has no summary.json below it, so no finished run{also}")
    return Found(runs, broken, [folder for folder in unfinished if _is_training(folder)])


def _below(top: Path) -> Iterable[Path]:
    if top.is_file():
        return [top] if top.name == "summary.json" else []
    return [path for name in ("summary.json", "config.yaml") for path in top.rglob(name)]


def _is_selftraining(folder: Path) -> bool:
    """Whether ``folder`` is a run of task=selftrain, finished or not."""
    try:
        return OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "task.name") == "selftrain"
    except (OSError, YAMLError, OmegaConfBaseException, ValueError):
        return False


def _is_training(folder: Path) -> bool:
    return (folder / "metrics.csv").is_file()


def read_run(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        UserError: if its summary is no JSON object with a task and a method.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or make the run again") from error
    needed = ("task", "grid") if isinstance(summary, dict) and "grid" in summary else ("task", "method")
    if not isinstance(summary, dict) or not all(isinstance(summary.get(key), str) for key in needed):
        raise UserError(f"{path} names no task and method, so sslzoo did not write it; move it out of the folder")
    try:
        config = keys_of(OmegaConf.load(folder / "config.yaml"))
    except (OSError, YAMLError, OmegaConfBaseException, ValueError):
        config = {}
    return Run(folder, summary, config)
