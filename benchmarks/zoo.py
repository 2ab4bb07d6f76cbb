"""Every method at demo scale: kNN accuracy before and after, time, speed, memory.

    python benchmarks/zoo.py [--methods moco,simclr] [--seeds 0,1,2] [--runs runs/zoo] [key=value ...]

Runs ``python -m sslzoo method=M seed=S`` one after the other, passes further overrides on, keeps each run under
``runs/zoo/M/S`` and does not repeat one that has finished. Prints a markdown table: mean and standard deviation over
seeds, the largest gain first.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from sslzoo.config import options

COLUMNS = ("method", "raw pixels", "random init", "pretrained", "gain", "seconds", "images/s", "peak MB", "seeds")


def finished(run_dir: Path, *typed: str) -> dict | None:
    """The summary of the run that ``typed`` makes in ``run_dir``, made now if not there; None where the run failed."""
    if not (run_dir / "summary.json").is_file():
        again = [f"resume={run_dir}"] if (run_dir / "config.yaml").is_file() else []
        subprocess.run([sys.executable, "-m", "sslzoo", *(again or [*typed, f"run_dir={run_dir}"])])
    path = run_dir / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and, over several seeds, standard deviation."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def gains(summaries: list[dict]) -> list[float]:
    """Points over random init, 0 to 1, a run each."""
    return [one["knn_top1"] - one["knn_top1_random_init"] for one in summaries]


def row(method: str, summaries: list[dict]) -> list[str]:
    """One method's line of the table."""
    if not summaries:
        return [method, *["failed"] * (len(COLUMNS) - 1)]
    return [
        method,
        spread([one["knn_top1_raw_pixels"] for one in summaries], 100),
        spread([one["knn_top1_random_init"] for one in summaries], 100),
        spread([one["knn_top1"] for one in summaries], 100),
        f"+{spread(gains(summaries), 100)}",
        spread([one["seconds"] for one in summaries], digits=0),
        spread([one["images_per_second"] for one in summaries], digits=0),
        spread([one["peak_memory_mb"] for one in summaries], digits=0),
        str(len(summaries)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(options("method")))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"))
    arguments, overrides = parser.parse_known_args()
    found = {}
    for method in arguments.methods.split(","):
        runs = [
            finished(arguments.runs / method / seed, f"method={method}", f"seed={seed}", *overrides)
            for seed in arguments.seeds.split(",")
        ]
        found[method] = [summary for summary in runs if summary]
    best = sorted(found, key=lambda method: -statistics.mean(gains(found[method]) or [-1.0]))
    lines = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *(row(method, found[method]) for method in best)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    (arguments.runs / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
