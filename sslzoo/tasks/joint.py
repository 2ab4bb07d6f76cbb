"""Joint training as a setting: what ``task.joint`` says, and the batches of images with classes that it asks for."""

import math
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from sslzoo.blocks import Encoder
from sslzoo.config import composed, plain
from sslzoo.data.box_module import Boxes
from sslzoo.data.images import NAMES
from sslzoo.data.mixed import JointBatch, Mixed
from sslzoo.data.module import Images
from sslzoo.data.subsets import labelled, part
from sslzoo.downstream.features import check_size
from sslzoo.errors import UserError
from sslzoo.joint import Joint
from sslzoo.method import Method
from sslzoo.tasks.jobs import devices
from sslzoo.tasks.runs import images
from sslzoo.tasks.training import check_strides, with_task_views


class Settings(NamedTuple):
    """What ``task.joint`` says, see ``conf/task/detect.yaml``."""

    data: str
    root: str | None
    batch_size: int
    size: int
    weight: float


def settings_of(config: DictConfig) -> Settings | None:
    """What ``config.task.joint`` says; None where it names no data.

    Raises:
        UserError: on a set that does not exist, or a number that is none of its kind.
    """
    said = plain(config.task)["joint"] or {"data": None}
    if said["data"] is None:
        return None
    found = Settings(**said)
    if found.data not in NAMES:
        raise UserError(
            f"task.joint.data={found.data} is no set of images with classes; give one of {', '.join(NAMES)}"
        )
    for key in ("batch_size", "size"):
        if type(said[key]) is not int or said[key] < 1:
            raise UserError(f"task.joint.{key}={said[key]} is no whole number of 1 or more")
    if type(found.weight) not in (int, float) or not 0 <= found.weight < math.inf:
        raise UserError(f"task.joint.weight={found.weight} is no weight of a loss; give a number of 0 or more")
    return found


def jointly(config: DictConfig, learner: Method, data: Boxes | Mixed) -> tuple[Method, Boxes | Mixed]:
    """``learner`` and its ``data``, with a classifier and its images beside where ``config.task.joint`` names some.

    The classifier starts alike whatever the learner is.

    Args:
        config: with the mean and standard deviation of the images that the encoder was trained on.
        learner, data: of detection, perhaps a student's.

    Raises:
        UserError: if the images cannot be had, have no labels, are too few, or do not fit the encoder.
    """
    settings = settings_of(config)
    if settings is None:
        return learner, data
    classified = class_images(config, settings, learner.encoder)
    pl.seed_everything(config.seed, verbose=False)
    module = Joint(learner, len(classified.train.classes), settings.weight, config.task.clip)
    return module, Mixed(data, classified, JointBatch)


def class_images(config: DictConfig, settings: Settings, encoder: Encoder) -> Images:
    """Batches of images with classes under the views of task=finetune, normalised as ``encoder`` expects.

    Raises:
        UserError: see ``jointly``.
    """
    check_size(encoder, settings.size, setting="task.joint.size")
    check_strides(config, encoder, [torch.zeros(1, 3, settings.size, settings.size)], "or a larger task.joint.size")
    encoder.train()
    own = composed(["task=finetune", f"data={settings.data}"])  # its views, and the set's own settings
    own.seed, own.image_size = config.seed + 2, settings.size  # an order of its own, beside a student's two
    own.data.root = own.data.root if settings.root is None else settings.root
    own.data.batch_size = settings.batch_size
    for key in ("mean", "std", "workers", "on_error"):
        own.data[key] = config.data[key]
    try:
        found = images(with_task_views(own))
        rows = labelled(found.train)
    except UserError as error:
        raise UserError(f"task.joint.data={settings.data} cannot be used: {error}") from error
    if len(rows) < settings.batch_size:
        raise UserError(
            f"task.joint.batch_size={settings.batch_size} is more than the {len(rows)} labelled training images of"
            f" {settings.data}; set task.joint.batch_size to at most {len(rows)}"
        )
    over = devices(config) * config.trainer.num_nodes
    if settings.batch_size % over:
        raise UserError(
            f"task.joint.batch_size={settings.batch_size} does not split evenly over {over} devices; set it to"
            f" {-(-settings.batch_size // over) * over}"
        )
    if len(rows) < len(found.train):
        found.train = part(found.train, rows)
    return found


def told(config: DictConfig, module: Method, steps: int) -> dict | None:
    """What a summary says of the images with classes; None without any."""
    if not isinstance(module, Joint):
        return None
    said = plain(config.task.joint)
    return {
        **said,
        "images_seen": steps * said["batch_size"],
        "classes": module.classifier.out_features,
        "loss": module.class_loss.item(),
    }
