"""Which backbone makes the better detector? The same steps on each, several seeds.

    python benchmarks/detect.py --backbones random,runs/zoo/moco/0,runs/zoo/swav/0 [--seeds 0,1,2] [--runs runs/detect]
        [key=value ...]

Runs ``python -m sslzoo task=detect backbone=B seed=S`` one after the other, passes further overrides on, keeps each run
under ``RUNS/NAME/S`` and does not repeat one that has finished. Prints a markdown table: mean and standard deviation
over seeds, on the scale of 0 to 100.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from zoo import finished, spread

COLUMNS = ("backbone", "AP", "AP50", "AP75", "against the first", "steps", "seconds", "seeds")


def label(backbone: str) -> str:
    """What a backbone is called in the table and in file names: its method, or its own name."""
    summary = Path(backbone) / "summary.json"
    return json.loads(summary.read_text())["method"] if summary.is_file() else backbone.replace("/", "_")


def row(name: str, summaries: list[dict], first: list[dict]) -> list[str]:
    """One backbone's line of the table."""
    if not summaries:
        return [name, *["failed"] * (len(COLUMNS) - 1)]
    gain = mean(one["map"] for one in summaries) - mean(one["map"] for one in first or summaries)
    return [
        name,
        *(spread([one[key] for one in summaries], 100) for key in ("map", "map_50", "map_75")),
        "" if summaries is first else f"{100 * gain:+.1f}",
        str(summaries[0]["steps"]),
        spread([one["seconds"] for one in summaries], digits=0),
        str(len(summaries)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs/detect"))
    arguments, overrides = parser.parse_known_args()
    found: dict[str, list[dict]] = {}
    for seed in arguments.seeds.split(","):
        for backbone in arguments.backbones.split(","):
            name, file = label(backbone), Path(backbone) / "backbone.safetensors"
            typed = "task=detect", f"backbone={file if file.is_file() else backbone}", f"seed={seed}"
            summary = finished(arguments.runs / name / seed, *typed, *overrides)
            found.setdefault(name, []).extend([summary] if summary else [])
    first = next(iter(found.values()))
    lines = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    lines += [row(name, summaries, first) for name, summaries in found.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    (arguments.runs / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
