"""Linear SVMs on frozen features, with all labels and with a few of each class: the VOC07 protocol.

Goyal et al. 2019 (arXiv 1905.01235, sec. 4.1 and 4.5), as the released code and PCL (Li et al. 2020, arXiv 2005.04966)
have it: one SVM a class, squared hinge, positives weigh twice, costs by cross-validation, k images a class five times.

Labels are ``(N,)`` classes, scored by accuracy, or ``(N, C)`` of 1 (has the class), 0 (has not) and -1 (left out: VOC's
difficult objects), scored by mean average precision.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from sslzoo.errors import UserError

COSTS = (1.0, 10.0, 100.0, *(2.0**-n for n in range(4, 20)))
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
FOLDS = 3
ONE_SHOT_COST = 0.5  # one image a class leaves nothing to cross-validate: PCL's


def one_of(labels: np.ndarray, classes: int) -> np.ndarray:
    """Classes ``(N,)`` as a matrix ``(N, C)``."""
    return (labels[:, None] == np.arange(classes)).astype(np.int8)


def fit(z: np.ndarray, labels: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """One linear SVM for each class, ``(C, D + 1)`` weights and bias.

    Args:
        z: unit features, ``(N, D)``.
        labels: ``(N, C)``; rows of -1 are left out of the class.
        costs: of each class, ``(C,)``.
    """
    weights = np.zeros((labels.shape[1], z.shape[1] + 1))
    for c, cost in enumerate(costs):
        asked = labels[:, c] >= 0
        svm = LinearSVC(C=cost, class_weight={1: 2, 0: 1}, dual="auto", max_iter=2000, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # at costs that are not chosen
            svm.fit(z[asked], labels[asked, c])
        weights[c] = *svm.coef_[0], svm.intercept_[0]
    return weights


def decide(weights: np.ndarray, z: np.ndarray) -> np.ndarray:
    """How far features ``(N, D)`` are on each class's side, ``(N, C)``."""
    return z @ weights[:, :-1].T + weights[:, -1]


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area below the precision-recall curve made monotone, as VOC 2010 has it.

    Args:
        scores: ``(N,)``.
        labels: ``(N,)`` of 1, 0, and -1 to be left out.
    """
    scores, labels = scores[labels >= 0], labels[labels >= 0]
    order = np.argsort(-scores, kind="stable")
    hit = labels[order] == 1
    if not hit.any():
        return float("nan")
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or more
    return float(envelope[hit].mean())


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Over the classes that some image has; ``(N, C)`` each."""
    found = [average_precision(s, y) for s, y in zip(scores.T, labels.T, strict=True) if (y == 1).any()]
    return float(np.mean(found))


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose highest score is their class's; ``(N, C)`` each."""
    return float((scores.argmax(1) == labels.argmax(1)).mean())


def best_costs(z: np.ndarray, labels: np.ndarray, costs: Sequence[float], folds: int, single: bool) -> np.ndarray:
    """The costs ``(C,)`` that cross-validation on ``z`` and ``labels`` prefers; of equals, the smallest.

    Each class's own by average precision, or one for all by accuracy where an image has a ``single`` class: classes
    then compete, and need one scale.
    """
    costs = tuple(sorted(costs))
    classes = labels.shape[1]
    if single:
        parts = list(StratifiedKFold(folds).split(z, labels.argmax(1)))
        found = [mean_over(parts, z, labels, np.full(classes, cost), accuracy) for cost in costs]
        return np.full(classes, costs[int(np.argmax(found))])
    chosen = np.empty(classes)
    for c in range(classes):
        asked = labels[:, c] >= 0
        own_z, own = z[asked], labels[asked, c : c + 1]
        parts = list(StratifiedKFold(folds).split(own_z, own[:, 0]))
        found = [mean_over(parts, own_z, own, np.array([cost]), mean_average_precision) for cost in costs]
        chosen[c] = costs[int(np.argmax(found))]
    return chosen


def mean_over(
    parts: list, z: np.ndarray, labels: np.ndarray, costs: np.ndarray, score: Callable[[np.ndarray, np.ndarray], float]
) -> float:
    """The mean score over ``parts``, rows to learn from and rows to be asked."""
    return float(np.mean([score(decide(fit(z[a], labels[a], costs), z[b]), labels[b]) for a, b in parts]))


def few(labels: np.ndarray, k: int, rng: np.random.Generator, single: bool) -> np.ndarray:
    """``labels`` ``(N, C)`` of which all but k images a class, and ``(C - 1) k`` without it, are -1.

    Where an image has a ``single`` class, the k of the other classes are those without it.
    """
    kept = np.full_like(labels, -1)
    if single:
        chosen = np.concatenate([rng.choice(np.flatnonzero(column == 1), k, replace=False) for column in labels.T])
        kept[chosen] = labels[chosen]
        return kept
    for c, column in enumerate(labels.T):
        without = np.flatnonzero(column == 0)
        others = min((labels.shape[1] - 1) * k, len(without))
        kept[rng.choice(np.flatnonzero(column == 1), k, replace=False), c] = 1
        kept[rng.choice(without, others, replace=False), c] = 0
    return kept


def score(scores: np.ndarray, labels: np.ndarray, single: bool) -> float:
    """Accuracy where an image has a ``single`` class, else mean average precision; ``(N, C)`` each."""
    return accuracy(scores, labels) if single else mean_average_precision(scores, labels)


def learn(
    z: np.ndarray, labels: np.ndarray, costs: Sequence[float] = COSTS, folds: int = FOLDS, single: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """SVMs ``(C, D + 1)`` at the costs ``(C,)`` that ``folds`` of the same images prefer, and these costs.

    Raises:
        UserError: if costs are to be chosen and a class has fewer images than folds.
    """
    asked = (labels >= 0).any(1)
    z, labels = z[asked], labels[asked]
    least = int((labels == 1).sum(0).min())
    if len(costs) > 1 and least < folds:
        raise UserError(
            f"the smallest class has {least} training images, too few to choose among {len(costs)} costs by {folds}"
            f" folds; set task.costs=[{ONE_SHOT_COST}]"
        )
    if len(costs) == 1 or folds < 2:
        chosen = np.full(labels.shape[1], costs[0] if len(costs) == 1 else ONE_SHOT_COST)
    else:
        chosen = best_costs(z, labels, costs, folds, single)
    return fit(z, labels, chosen), chosen


def lowshot(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    shots: Sequence[int] = SHOTS,
    samples: int = 5,
    costs: Sequence[float] = COSTS,
    seed: int = 0,
    single: bool = True,
) -> dict[int, dict[str, float | None]]:
    """k images a class, ``samples`` times: ``{k: {"mean": ..., "sd": ...}}``; k more than a class has is left out.

    Costs by cross-validation on these images alone, in at most 3 folds. (The released code takes the cost that is best
    on the held-out images, which flatters its numbers.)

    Args:
        train, val: features ``(N, D)`` and labels ``(N, C)`` each.
        shots: k.
        samples: how often k images are drawn; sd is that of the sample, None for one.
        costs: to choose among; one is taken as it is.
        seed: of the draws.
        single: whether an image has one class only.
    """
    z, labels = train
    least = int((labels == 1).sum(0).min())
    table: dict[int, dict[str, float | None]] = {}
    for k in shots:
        if k > least:
            continue
        found = []
        for sample in range(samples):
            kept = few(labels, k, np.random.default_rng([seed, k, sample]), single)
            weights, _ = learn(z, kept, costs, min(FOLDS, k), single)
            found.append(score(decide(weights, val[0]), val[1], single))
        sd = float(np.std(found, ddof=1)) if samples > 1 else None
        table[k] = {"mean": float(np.mean(found)), "sd": sd}
    return table
