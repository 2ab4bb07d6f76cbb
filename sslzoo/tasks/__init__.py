"""The verbs, a file each: ``run(config, overrides)`` takes the configuration and what was typed, returns scores."""

from collections.abc import Callable, Sequence
from importlib import import_module

from omegaconf import DictConfig


def task(name: str) -> Callable[[DictConfig, Sequence[str]], dict]:
    """The verb ``name``, imported only now: each needs other libraries."""
    return import_module(f"sslzoo.tasks.{name}").run
