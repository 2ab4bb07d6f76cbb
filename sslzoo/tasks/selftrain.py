"""Self-training: teacher, pseudo-labels, student and control, each in a folder of the run; or a grid of such runs."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from sslzoo.tasks import selftrain_grid
from sslzoo.tasks.parts import check_typed
from sslzoo.tasks.selftrain_cell import cell, check, kind_of
from sslzoo.tasks.training import resumed, started


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train, label, train again: what is there already is not done again; or all cells of ``config.grid``."""
    if config.resume is not None:
        typed = [word for word in overrides if not word.startswith("resume=")]
        config, _ = resumed(config, overrides)
        overrides = [*typed_words(Path(config.run_dir)), *typed]  # of one key the last counts
    kind = kind_of(config)
    check_typed(overrides, kind.GIVEN, kind.INSTEAD)
    if config.grid is not None:
        return selftrain_grid.run(config, overrides)
    images = check(config, overrides)
    run_dir = started(config, overrides)
    return cell(config, overrides, run_dir, images)


def typed_words(run_dir: Path) -> list[str]:
    """What was typed for a run, without the command before it."""
    return shlex.split((run_dir / "command.txt").read_text())[3:]
