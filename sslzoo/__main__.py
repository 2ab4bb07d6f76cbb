"""``python -m sslzoo key=value ...``: compose, check, run one task; ``-m`` sweeps over comma-separated values."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Sequence
from itertools import product

from rich.console import Console
from rich.logging import RichHandler

from sslzoo.errors import UserError

USAGE = """usage: python -m sslzoo [-m] key=value ...

  python -m sslzoo method=moco                     pretrain at demo scale, on the built-in photographs
  python -m sslzoo method=moco data=folder data.root=DIR image_size=64
  python -m sslzoo task=knn backbone=runs/moco/DATE_TIME/backbone.safetensors
  python -m sslzoo resume=runs/moco/DATE_TIME      go on with a run that was stopped
  python -m sslzoo -m method=moco,moco_v2 seed=0,1,2

choices:"""


def usage() -> str:
    """What can be typed."""
    from sslzoo.config import options

    groups = ("task", "method", "scale", "protocol", "data", "views", "encoder", "logger")
    return USAGE + "".join(f"\n  {group}={'|'.join(options(group))}" for group in groups)


def run(overrides: Sequence[str]) -> dict:
    """Compose ``overrides`` and run the task they name; returns its scores."""
    from sslzoo.config import composed
    from sslzoo.tasks import task, task_to_resume

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    typed = dict(override.partition("=")[::2] for override in overrides)
    again = [f"task={task_to_resume(typed['resume'])}"] if "resume" in typed and "task" not in typed else []
    config = composed([*again, *overrides])  # a run that goes on has the settings of its own task
    return task(config.task.name)(config, overrides)


def sweep(overrides: Sequence[str]) -> int:
    """Run every combination of comma-separated values, each in a process of its own; returns the worst exit code."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices = [
        [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [text]
        for text, override in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True)
    ]
    return max(subprocess.run([sys.executable, "-m", "sslzoo", *job]).returncode for job in product(*choices))


def one(overrides: Sequence[str]) -> int:
    """Run one task; a user's mistake is one line and exit code 2, a signal its own code."""
    from sslzoo.monitor import Stopped

    try:
        run(overrides)
    except UserError as error:
        print(f"sslzoo: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return stopped.code
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    logging.getLogger("sslzoo").setLevel(logging.INFO)
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return 0
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    multirun = {"-m", "--multirun"} & set(arguments)
    overrides = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    return sweep(overrides) if multirun else one(overrides)


if __name__ == "__main__":
    sys.exit(main())
