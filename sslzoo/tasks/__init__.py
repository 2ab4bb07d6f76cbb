"""The verbs, a file each: ``run(config, overrides)`` takes the configuration and what was typed, returns scores."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def task(name: str) -> Callable[[DictConfig, Sequence[str]], dict]:
    """The verb ``name``, imported only now: each needs other libraries."""
    return import_module(f"sslzoo.tasks.{name}").run


def task_to_resume(run_dir: str | Path) -> str:
    """The verb of a run that is to go on; where there is no such run ``pretrain``, which will say so."""
    path = Path(run_dir)
    stored = (path if path.is_dir() else path.parent) / "config.yaml"
    return OmegaConf.load(stored).task.name if stored.is_file() else "pretrain"
