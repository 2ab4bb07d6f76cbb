"""What all tasks share: the data, the device, and a run directory of one's own."""

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from sslzoo import __version__
from sslzoo.blocks.encoder import Encoder
from sslzoo.checkpoints.backbone import load_backbone
from sslzoo.checkpoints.files import write_text
from sslzoo.config import built, config_hash, plain
from sslzoo.data.images import load
from sslzoo.data.module import Images
from sslzoo.errors import UserError
from sslzoo.views import Clean, Views, parse


def images(config: DictConfig) -> Images:
    """The data that ``config.data``, ``config.views`` and the sizes describe."""
    settings = plain(config.data)
    mean, std = settings.pop("mean"), settings.pop("std")
    batch_size, workers = settings.pop("batch_size"), settings.pop("workers")
    settings.pop("label_fraction", None), settings.pop("label_list", None)  # for who learns from labels
    train, val = load(**settings)
    return Images(
        train,
        val,
        views_of(config),
        Clean(config.image_size, mean, std),
        batch_size,
        seed=config.seed,
        workers=workers,
        on_error=settings["on_error"],
    )


def views_of(config: DictConfig) -> Views:
    """What ``config.views`` says, normalised as ``config.data`` is: a list of views, or a class called like Views."""
    settings = {"mean": list(config.data.mean), "std": list(config.data.std), "seed": config.seed}
    if "_target_" in config.views:
        return built(config.views, "views", **settings)
    return Views(parse(plain(config.views)), **settings)


def backbone_and_config(config: DictConfig) -> tuple[Encoder, DictConfig]:
    """The encoder ``config.backbone`` names, on its device, and the configuration with the images it was trained on.

    Raises:
        UserError: if none was named, or it cannot be loaded.
    """
    if config.backbone is None:
        raise UserError(f"task={config.task.name} needs backbone=: a run's backbone.safetensors, random, or timm/NAME")
    encoder = load_backbone(config.backbone, config.pretrained, plain(config.encoder))
    config = OmegaConf.merge(config, {"image_size": encoder.metadata.get("image_size", config.image_size)})
    for key in ("mean", "std"):
        config.data[key] = encoder.metadata.get(key, config.data[key])
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    return encoder.to("cuda" if on_gpu else "cpu"), config


ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


def device(config: DictConfig) -> tuple[str, str]:
    """Accelerator and precision; ``auto`` is bfloat16 where the hardware computes in it."""
    wanted = config.trainer.accelerator
    for key, allowed in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
        if str(config.trainer[key]) not in allowed:
            raise UserError(f"trainer.{key}={config.trainer[key]} is none of {', '.join(allowed)}")
    on_gpu = torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda")
    accelerator = "cuda" if on_gpu else "cpu" if wanted == "auto" else wanted
    if config.trainer.precision != "auto":
        return accelerator, str(config.trainer.precision)
    bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return accelerator, "bf16-mixed" if bf16 else "32-true"


def more_loggers(config: DictConfig, run_dir: Path) -> list:
    """What ``logger=`` adds to metrics.csv."""
    settings = plain(config.logger)
    name = settings.pop("name")
    if name == "tensorboard":
        try:
            return [pl.loggers.TensorBoardLogger(run_dir, name="", version="", **settings)]
        except ModuleNotFoundError as error:
            raise UserError('logger=tensorboard needs a package: pip install "sslzoo[tensorboard]"') from error
    if name == "wandb":
        return [pl.loggers.WandbLogger(save_dir=run_dir, config=plain(config), **settings)]
    return []


def claim_run_dir(config: DictConfig, name: str) -> Path:
    """A directory of this run's own.

    Raises:
        UserError: if ``run_dir`` holds a run already or cannot be written.
    """
    run_dir = Path(config.run_dir or Path("runs") / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if rank_zero_only.rank:  # rank 0 claims it, the others write nothing
        return run_dir
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"run_dir={run_dir} exists and is not empty; name another, or go on with resume={run_dir}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(config))
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: {error.strerror}; name another") from error
    return run_dir


def provenance(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Where a number comes from: seed, config hash, versions, command."""
    packages = ("torch", "pytorch-lightning", "timm")
    return {
        "seed": config.seed,
        "config_hash": config_hash(config),
        "versions": {
            "sslzoo": __version__,
            **{name: version(name) for name in packages},
            "python": sys.version.split()[0],
        },
        "command": shlex.join(["python", "-m", "sslzoo", *overrides]),
    }


def write_summary(run_dir: Path, summary: dict) -> None:
    """``summary.json``, whole."""
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
