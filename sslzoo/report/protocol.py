"""Under which protocol a score was measured: what may be averaged and compared, and what may not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sslzoo.report.found import Run

LOWER = ("nme", "error", "perplexity")  # the scores of which less is better
FRACTIONS = ("top1", "top5", "accuracy", "miou", "auc", "nme", "pck")  # endings of those shown in percent
PRECISIONS = (
    "map",
    "mar",
    "mask_map",
    "mask_mar",
    "oks_map",
    "oks_mar",
    "gain",
)  # beginnings of those, most are COCO's
NAMES = {"knn": "kNN", "top1": "top-1", "top5": "top-5", "map": "mAP", "mar": "mAR", "miou": "mIoU", "nme": "NME",
         "pck": "PCK", "oks": "OKS", "auc": "AUC"}  # fmt: skip

# What a protocol is made of, beside task.* and data.*, for tasks that train; and what is no part of any.
FITTED = ("trainer.max_", "trainer.accumulate_grad_batches", "data.batch_size")
NO_PROTOCOL = (
    *("task.name", "task.teacher", "task.cache", "task.grid_", "data.root", "data.batch_size", "data.workers"),
    *("data.mean", "data.std", "data.on_error", "data.memory_limit_mb", "data.download"),
)
ALWAYS_SHOWN = (
    "k",
    "temperature",
    "fraction",
    "label_fraction",
    "shots",
    "protocol",
    "model",
    "augment",
)  # even if all agree
SELFTRAINED = (  # settings of task=selftrain, which stand beside task.*
    *("augment", "label_fraction", "threshold", "alpha", "iterations", "unlabelled_images", "self_training"),
    *("steps", "growth", "longer", "warmup"),
)


@dataclass(frozen=True)
class Column:
    """A score under one protocol.

    Attributes:
        data: the set it was measured on.
        task: the task that measured it; ``pretrain`` for a training run's own kNN.
        score: its name in the summary.
        settings: the protocol, ``((key, value), ...)``; two columns never share it.
    """

    data: str
    task: str
    score: str
    settings: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """``linear_top1`` as ``linear top-1``, with the task where the score does not say it."""
        words = " ".join(NAMES.get(word, word) for word in self.score.split("_"))
        return words if self.task in ("pretrain", self.score.partition("_")[0]) else f"{self.task}: {words}"

    @property
    def scale(self) -> float:
        """What a value is multiplied with to be shown."""
        return 100.0 if self.score.endswith(FRACTIONS) or self.score.startswith(PRECISIONS) else 1.0

    @property
    def unit(self) -> str:
        return "%" if self.scale == 100 else ""

    @property
    def title(self) -> str:
        """Name and unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.score.endswith(LOWER)

    def shown(self, value: float, beside: float | None = None) -> str:
        """A value with the digits that tell something, or with as many places as the one it stands beside."""
        if self.scale == 100:
            return f"{100 * value:.1f}"
        size = abs(value if beside is None else beside)
        return f"{value:.{min(max(2 - math.floor(math.log10(size)), 0), 8) if size else 2}f}"


def measured(run: Run) -> dict[Column, tuple[float, object]]:
    """The scores of a run, each under its protocol, with its interval or None."""
    told = run.summary
    data, settings = str(told.get("data", run.config.get("data.name", "-"))), _protocol(run)
    found = {
        Column(data, run.task, score, _frozen(settings)): (value, told.get(f"{score}_interval"))
        for score, value in run.scores.items()
    }
    shots = told.get("lowshot")  # images a class -> mean over draws
    for k, scores in shots.items() if isinstance(shots, dict) else ():
        if isinstance(scores, dict) and finite(scores.get("mean")):
            column = Column(data, run.task, "lowshot_top1", _frozen(settings | {"task.shots": k}))
            found[column] = float(scores["mean"]), None
    return found


def _protocol(run: Run) -> dict[str, object]:
    config = run.config
    if not config:  # the summary is all there is
        endings = ("_k", "_temperature", "fraction", "protocol", "shots")
        return {key: value for key, value in run.summary.items() if key.endswith(endings)}
    asked = ("monitor.k", "monitor.temperature", "monitor.bank", "monitor.queries")
    meant = ("data.", "image_size", *(asked if run.task == "pretrain" else ("task.",)))
    kept = {key: value for key, value in config.items() if key.startswith(meant) and not key.startswith(NO_PROTOCOL)}
    if run.task not in ("pretrain", "knn"):
        kept |= {key: value for key, value in config.items() if key.startswith(FITTED)}
    if run.task == "selftrain":
        kept |= {key: value for key, value in config.items() if key.partition(".")[0] in SELFTRAINED}
    if "teacher" in run.summary:  # the student
        kept |= {key: value for key, value in config.items() if key.startswith("encoder.")}
    if "task.shots" in kept:
        kept["task.shots"] = "all"
    whole = {"data.label_fraction": 1.0}  # what runs meant before there was such a key
    return {key: v for key, v in (kept | run.root).items() if v is not None and whole.get(key) != v}


def _frozen(settings: dict[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, str(value)) for key, value in settings.items()))


def protocols(columns: Sequence[Column]) -> dict[Column, str]:
    """What to say of each column's protocol: what is always worth saying, and what tells it from its like."""
    found = {}
    for column in columns:
        mine = (column.data, column.task, column.score)
        alike = [dict(other.settings) for other in columns if (other.data, other.task, other.score) == mine]
        own, said = dict(column.settings), ["in training"] if column.task == "pretrain" else []
        for key in dict.fromkeys(key for settings in alike for key in settings):
            name = (key.partition(".")[2] or key).removeprefix("knn_")
            differs = any(settings.get(key) != own.get(key) for settings in alike)
            if differs or (key in own and name in ALWAYS_SHOWN):
                said.append(f"{name}={own.get(key, '-')}".replace("temperature=", "T="))
        found[column] = ", ".join(said)
    return found


def finite(value: object) -> bool:
    """Whether ``value`` is a number one can draw."""
    return isinstance(value, int | float) and math.isfinite(value)
