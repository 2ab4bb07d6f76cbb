"""Weighted nearest neighbours: sslzoo's whole grid against one vote of lightly's, in CPU time on one thread each.

    python benchmarks/knn.py [--rounds 5] [--queries 10000] [--bank 50000] [--dim 512] [--json out.json]

lightly's knn_predict gives one k and one temperature (200 and 0.1, its defaults), in batches of 256 queries; sslzoo
gives k of 1, 5, 10, 20, 50, 100 and 200 at three temperatures, top-1 and top-5, from one search. Unit features of
overlapping clusters, with 100 and with 1,000 classes; both must name the same share of labels right. The matrix product
in float32 is what no search goes below that multiplies in it; sslzoo's multiplies in bfloat16 where the CPU is fast at
that, and decides in float64. A figure is the median over the rounds, a ratio the median of the rounds' ratios.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightly.utils.benchmarking.knn import knn_predict
from rich.console import Console
from rich.table import Table

from sslzoo.downstream.knn import ranks
from sslzoo.downstream.search import neighbours
from timing import Seconds, header, interleaved, median, ratio

KS, TEMPERATURES = (1, 5, 10, 20, 50, 100, 200), (0.03, 0.07, 0.1)
K, T = 200, 0.1
CLASSES = (100, 1000)
LIMIT = "matrix product alone, float32"


def clusters(n: int, dim: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit features ``(n, dim)`` float32 around the classes' directions, and labels ``(n,)``."""
    centres = np.random.default_rng(0).standard_normal((classes, dim), dtype=np.float32)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    z = 0.2 * centres[labels] + rng.standard_normal((n, dim), dtype=np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True), labels


def contestants(bank: np.ndarray, queries: np.ndarray, labels: dict, truth: dict) -> tuple[dict[str, Callable], dict]:
    """What is timed, by name; and the accuracy each found at k = 200, T = 0.1, filled in as they run."""
    found: dict[str, float] = {}
    held, asked = torch.from_numpy(bank).T.contiguous(), torch.from_numpy(queries)
    product = torch.empty(256, len(bank))

    def lightly(classes: int) -> None:
        known = torch.from_numpy(labels[classes])
        first = [knn_predict(x, held, known, classes, K, T)[:, 0] for x in asked.split(256)]
        found[f"lightly, {classes}"] = float((torch.cat(first).numpy() == truth[classes]).mean())

    def ours(classes: int) -> None:
        similarity, rows = neighbours(bank, queries, max(KS))
        places = ranks(similarity, labels[classes][rows], truth[classes], KS, TEMPERATURES)
        found[f"sslzoo, {classes}"] = float((places[KS.index(K), TEMPERATURES.index(T)] == 0).mean())

    def multiply() -> None:
        for x in asked.split(256):
            torch.mm(x, held, out=product[: len(x)])

    def clocked(work: Callable, *arguments: int) -> Callable[[], Seconds]:
        def run() -> Seconds:
            start = Seconds.now()
            work(*arguments)
            return Seconds.now().since(start)

        return run

    rows = {f"{name}, {classes}": clocked(work, classes) for work, name in ((lightly, "lightly"), (ours, "sslzoo"))
            for classes in labels}  # fmt: skip
    return rows | {LIMIT: clocked(multiply)}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)

    console, facts = Console(), header(["torch", "lightly", "numba", "numpy"])
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    bank, fine = clusters(arguments.bank, arguments.dim, CLASSES[-1], 1)
    queries, fine_truth = clusters(arguments.queries, arguments.dim, CLASSES[-1], 2)
    labels, truth = ({c: y % c for c in CLASSES} for y in (fine, fine_truth))
    rows, found = contestants(bank, queries, labels, truth)
    neighbours(bank[:300], queries[:2], 200)
    ranks(np.ones((1, 1)), np.zeros((1, 1)), np.zeros(1), [1], [T])  # compiled, or read from disk, before the clock
    times = interleaved(rows, arguments.rounds)

    size = f"{arguments.bank:,} x {arguments.queries:,} x {arguments.dim}"
    table = Table("", "classes", "votes", "seconds", "times lightly's speed", "top-1 at k=200, T=0.1", title=size)
    record = []
    for name, values in times.items():
        kind, _, classes = name.partition(", ")
        ours, peer = kind == "sslzoo", times.get(f"lightly, {classes}")
        speed = ratio(peer, values).cpu if peer else None
        votes = f"{len(KS)} k x {len(TEMPERATURES)} T" if ours else "1" if peer else "-"
        cells = [f"{speed:.2f}" if speed else "-", f"{found[name]:.4f}" if name in found else "-"]
        table.add_row(*([kind, classes] if peer else [name, "-"]), votes, f"{median(values).cpu:.2f}", *cells)
        record.append({"name": name, "cpu": [v.cpu for v in values], "ratio": speed, "top1": found.get(name)})
    console.print(table)
    for classes in CLASSES:
        equal = abs(found[f"sslzoo, {classes}"] - found[f"lightly, {classes}"]) <= 1 / arguments.queries
        console.print(f"{classes} classes: accuracy {'equal' if equal else 'DIFFERS'}", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "size": size, "rounds": arguments.rounds, "rows": record}))


if __name__ == "__main__":
    main()
