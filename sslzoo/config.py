"""From the command line to one checked configuration, and from there to modules."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslzoo.blocks.encoder import Encoder
from sslzoo.data.images import NAMES
from sslzoo.errors import UserError
from sslzoo.optim import Optim

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # installed, or a checkout

ConfigStore.instance().store(group="optim", name="default", node=Optim)  # its defaults live in the class alone


def options(group: str) -> list[str]:
    """Choices of a config group, e.g. the methods."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration that ``overrides`` describe.

    Raises:
        UserError: on a choice or key that does not exist, naming those that do.
    """
    overrides = by_kind(overrides)
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep:
            raise UserError(f"{override!r} is no override: write key=value, e.g. method=moco")
        if (CONF / key).is_dir() and value and value not in options(key):
            near = get_close_matches(value, options(key), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{key}={value} does not exist: {key} is one of {', '.join(options(key))}{hint}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=[*own_protocol(overrides), *tuned(overrides), *overrides])
        if "trains" in config:  # of self-training, whatever the data and the protocol
            config.data.label_fraction = config.label_fraction
        OmegaConf.resolve(config)
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        raise UserError(_unknown_key(overrides) or _one_line(error)) from error
    return config


def by_kind(overrides: Sequence[str]) -> list[str]:
    """What ``overrides`` mean: ``task=selftrain`` has own settings for images to classify, and for class maps."""
    if "task=selftrain" not in overrides:
        return list(overrides)
    from sslzoo.downstream.segmenters import MODELS  # seconds to import, which few commands need

    typed = {key: value.strip("'\"") for key, _, value in (each.partition("=") for each in overrides)}
    if typed.get("data") in NAMES:
        kind = "selftrain_classes"
    elif typed.get("task.model") in MODELS or "cityscapes" in (typed.get("data"), of_protocol(typed, "data")):
        kind = "selftrain_maps"
    else:
        kind = "selftrain_maps" if of_protocol(typed, "task") == "segment" else "selftrain"
    return [f"task={kind}" if each == "task=selftrain" else each for each in overrides]


def of_protocol(typed: Mapping[str, str], group: str) -> str | None:
    """What the protocol that was typed chooses of a group; None where it chooses nothing."""
    file = CONF / "protocol" / f"{typed.get('protocol')}.yaml"
    defaults = OmegaConf.load(file).get("defaults", []) if file.is_file() else []
    return next((each[f"override /{group}"] for each in defaults if f"override /{group}" in each), None)


def _unknown_key(overrides: Sequence[str]) -> str | None:
    """What to say of the first override whose key does not exist; None where all do."""
    choices = [override for override in overrides if (CONF / override.partition("=")[0]).is_dir()]
    if len(choices) == len(overrides):
        return None
    node = composed(choices)
    for override in overrides:
        key = override.partition("=")[0]
        parent, _, name = key.rpartition(".")
        settings = OmegaConf.select(node, parent) if parent else node
        if override not in choices and isinstance(settings, DictConfig) and name not in settings:
            has = ", ".join(str(known) for known in settings if not str(known).startswith("_"))
            return f"{key} is no setting; {parent or 'the configuration'} has {has}"
    return None


def tuned(overrides: Sequence[str]) -> list[str]:
    """What ``conf/tuned/SCALE/METHOD.yaml`` would type before ``overrides``, except what these type themselves.

    Whoever types ``views=moco_v2`` gets these views as they are: settings of the views chosen there go with them.
    """
    typed = dict(override.partition("=")[::2] for override in overrides)
    defaults = {key: choice for entry in OmegaConf.load(CONF / "config.yaml").defaults if isinstance(entry, DictConfig)
                for key, choice in entry.items()}  # fmt: skip
    scale, method = (typed.get(key, defaults[key]) for key in ("scale", "method"))
    path = CONF / "tuned" / scale / f"{method}.yaml"
    if not path.is_file():
        return []
    settings = OmegaConf.to_container(OmegaConf.load(path))
    chosen = {key for key in settings if (CONF / key).is_dir()} & typed.keys()
    kept = (key for key in settings if key not in typed and key.partition(".")[0] not in chosen)
    return [f"{key}={json.dumps(settings[key])}" for key in kept]


def own_protocol(overrides: Sequence[str]) -> list[str]:
    """``protocol=TASK`` where a task has settings of its own for data and training, and no protocol was typed."""
    typed = dict(override.partition("=")[::2] for override in overrides)
    name = typed.get("task")
    if "protocol" in typed or name not in options("protocol"):
        return []
    # A network this small places its boxes well in the built-in scenes, but cannot name eight classes, nor teach them.
    agnostic = name.startswith("selftrain") and typed.get("data", "scenes") == "scenes"
    return [f"protocol={name}", *(["data.class_agnostic=true"] if agnostic else [])]


def _one_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [line.strip() for line in f"{error}\n{cause or ''}".splitlines()]
    kept = [
        line for line in lines if line and not line.startswith(("full_key", "object_type", "See ", "reference_type"))
    ]
    return " ".join(dict.fromkeys(kept))


def keys_of(config: DictConfig) -> dict[str, object]:
    """Every leaf of ``config`` by its dotted key."""
    flat: dict[str, object] = {}

    def walk(prefix: str, node) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            flat[prefix] = node

    walk("", plain(config))
    return flat


# What may differ between two halves of one run: where and how it runs, never what it computes.
PLACE = (
    "trainer.devices", "trainer.accelerator", "trainer.num_nodes", "data.root", "data.workers", "data.on_error",
    "logger.", "monitor.", "checkpoint.", "resume", "run_dir", "backbone", "runs", "task.cache",
    "task.joint.root", "task.also", "self_training", "jobs", "cells",
)  # fmt: skip


def config_hash(config: DictConfig) -> str:
    """Short hash of what a run computes, equal for equal runs wherever they are."""
    meant = {key: value for key, value in keys_of(config).items() if not key.startswith(PLACE)}
    return hashlib.sha256(json.dumps(meant, sort_keys=True, default=str).encode()).hexdigest()[:12]


def differences(a: DictConfig, b: DictConfig) -> Iterable[tuple[str, object, object]]:
    """Keys in which two configurations would compute different things: ``(key, in a, in b)``."""
    left, right = keys_of(a), keys_of(b)
    for key in ["recipe", *left, *(key for key in right if key not in left)]:
        if not key.startswith(PLACE) and left.get(key) != right.get(key):
            yield key, left.get(key), right.get(key)


def build_encoder(config: DictConfig) -> Encoder:
    """The encoder that ``config.encoder`` describes."""
    return built(config.encoder, "encoder", None if "_target_" in config.encoder else Encoder)


def build_optim(config: DictConfig) -> Optim:
    """The optimizer's recipe; its batch is the global one, over accumulated parts."""
    batch_size = config.data.batch_size * config.trainer.accumulate_grad_batches
    return built(config.optim, "optim", Optim, batch_size=batch_size)


def plain(node: DictConfig) -> dict:
    """``node`` as dicts, lists and plain values."""
    return OmegaConf.to_container(node, resolve=True)


def built(node: DictConfig, name: str, target: type | None = None, **more):
    """``target``, or the class that ``node`` names, made from plain values in YAML and ``more``.

    Raises:
        UserError: where a key is no argument of it.
    """
    arguments = plain(node) | more
    make = get_class(arguments.pop("_target_")) if target is None else target
    try:
        return make(**arguments)
    except TypeError as error:
        raise UserError(f"{name} cannot be built from its settings: {error}") from error
