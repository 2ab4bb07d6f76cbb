"""Fine-tune a backbone on labels, all of them or a part, and score it on held-out images."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sslzoo.blocks import Encoder
from sslzoo.checkpoints.backbone import load_projector, save_backbone
from sslzoo.checkpoints.classifier import save_classifier
from sslzoo.config import config_hash, plain
from sslzoo.data.images import ImageSet
from sslzoo.data.mixed import Mixed
from sslzoo.data.module import Images
from sslzoo.data.pseudo_classes import PseudoClasses
from sslzoo.data.subsets import as_list, labelled, part
from sslzoo.downstream.features import check_size
from sslzoo.downstream.finetune import Finetune
from sslzoo.downstream.interval import interval
from sslzoo.downstream.labels import labelled_rows
from sslzoo.downstream.taught import TaughtFinetune
from sslzoo.errors import UserError
from sslzoo.moving_teacher import Moving
from sslzoo.report.progress import console
from sslzoo.selftrain import LossBalance, Student, fingerprint
from sslzoo.tasks.runs import backbone_and_config, device, provenance, views_of, write_summary
from sslzoo.tasks.training import (
    check_strides,
    effort,
    fit_batch,
    images_seen,
    learn,
    leave_cores_to_views,
    own_optim,
    read_checkpoint,
    resumed,
    started,
    task_images,
    with_task_views,
)

# An image as a moving teacher sees it: its middle, whole where it is a square
TEACHERS_VIEW = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0}


class Ready(NamedTuple):
    """What a training begins with.

    Attributes:
        sized: the configuration, with the images that the backbone was trained on.
        data: batches of labelled images; with pseudo-labels a second half of these.
        whole: the training set; of it ``rows`` (n,) may be used with their labels.
        learner: at its start, of which ``start`` is the fingerprint.
        module: what is trained: the learner, or a student of it.
    """

    sized: DictConfig
    data: Images | Mixed
    whole: ImageSet
    rows: np.ndarray
    learner: Finetune
    module: Finetune | Student
    start: str


def ready(config: DictConfig, overrides: Sequence[str]) -> Ready:
    """All that ``config`` asks for, before anything is trained or written.

    Raises:
        UserError: if that can not be trained.
    """
    moving = Moving.asked(config.task.teacher, config.task.pseudo)
    pl.seed_everything(config.seed, verbose=False)
    encoder, sized = backbone_and_config(OmegaConf.merge(config, {}))
    check_size(encoder, sized.image_size)
    image = torch.zeros(1, 3, sized.image_size, sized.image_size)
    check_strides(config, encoder, [image], "or take a backbone of larger images")
    projector = kept_projector(config, encoder)
    data = task_images(sized, overrides)
    whole, settings = data.train, config.data
    rows = labelled(whole, settings.label_fraction, settings.label_list, config.seed)
    data.train = part(whole, rows)
    labelled_rows("finetune", data.train, data.val)
    fit_batch(data)
    optim, task = own_optim(config, data), config.task
    module = learner = Finetune(encoder, len(whole.classes), optim, projector, task.layer_decay, task.head_lr_scale)
    learner.seed = config.seed
    learner.parameter_groups()  # complains now, not after the run directory is claimed
    start = fingerprint(learner)
    if task.pseudo is not None:
        file, soft, alpha = pseudo_settings(task.pseudo)
        told, balance = PseudoClasses.read(file, whole), LossBalance(alpha)
        if moving is None:
            data = Mixed(data, pseudo_images(sized, told.images(whole, soft), data))
            module = Student(learner, balance)
        else:
            data = Mixed(data, pseudo_images(sized, part(whole, told.rows), data, TEACHERS_VIEW))
            module = TaughtFinetune(learner, balance, moving, soft)
    return Ready(sized, data, whole, rows, learner, module, start)


def pseudo_settings(pseudo: DictConfig) -> tuple[str, bool, float]:
    """File, softness and weight of pseudo-labels, as ``task.pseudo`` names them.

    Raises:
        UserError: if they are not named, or something else is.
    """
    usual = {"file": None, "soft": True, "alpha": 1.0}
    said = plain(pseudo) if isinstance(pseudo, DictConfig) else {}
    if not isinstance(said.get("file"), str) or said.keys() - usual.keys():
        raise UserError(f"task.pseudo={pseudo} names no pseudo-labels; give {{file: FILE, soft: true, alpha: 1.0}}")
    return tuple((usual | said).values())


def pseudo_images(config: DictConfig, taken: ImageSet, human: Images, more: Mapping | None = None) -> Images:
    """Batches of pseudo-labelled images beside those of ``human``, in an order and under views of their own.

    Args:
        more: settings of a view that comes before these, of their size.

    Raises:
        UserError: if there are too few for one batch, or gradients are to be accumulated.
    """
    if config.trainer.accumulate_grad_batches != 1:
        raise UserError("pseudo-labels do not go with accumulated gradients: set trainer.accumulate_grad_batches=1")
    if len(taken) < human.batch_size:
        raise UserError(
            f"there are {len(taken)} pseudo-labelled images, fewer than a batch of {human.batch_size}; set"
            f" data.batch_size to at most {len(taken)}"
        )
    seed = config.seed + 1
    sized = with_task_views(OmegaConf.merge(config, {"seed": seed}))
    if more is not None:
        sized.views = {"before": {**more, "size": config.image_size}, **sized.views}
    views = views_of(sized)
    return Images(taken, None, views, human.clean, human.batch_size, seed, human.workers, human.on_error)


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train ``config.backbone`` and a classifier on the labels; leave both, the list of labels used, and the score."""
    config, checkpoint = resumed(config, overrides)
    sized, data, whole, rows, learner, module, start = ready(config, overrides)
    encoder, projector, optim, task = learner.encoder, learner.projector, learner.optim, config.task
    leave_cores_to_views(device(config)[0], config)
    state = read_checkpoint(checkpoint, module, f"task=finetune of {config.backbone}") if checkpoint else None
    run_dir = started(config, overrides, as_list(whole, rows))
    console.print(f"finetune {config.backbone} on {len(rows)} labelled images of {whole.name}, {run_dir}")

    trainer, metrics, evaluate = learn(module, data, config, run_dir, state, checkpoint, task.every_epochs or 1)
    if not trainer.is_global_zero:
        return {}
    method = f"{encoder.metadata['method']}+finetune"
    backbone = save_backbone(
        encoder,
        run_dir / "backbone.safetensors",
        method=method,
        mean=list(sized.data.mean),
        std=list(sized.data.std),
        image_size=sized.image_size,
        config_hash=config_hash(config),
        projector=projector if len(projector) else None,
    )
    save_classifier(learner.classifier, run_dir / "classifier.safetensors", whole.classes)
    summary = {
        "task": "finetune",
        "method": encoder.metadata["method"],
        "data": whole.name,
        **evaluate.values,
        "finetune_top1_interval": list(interval(evaluate.right)),
        "label_fraction": config.data.label_fraction,
        "labelled_images": len(rows),
        "tuned_from": task["from"],
        **effort(trainer, data, metrics, optim),
        "images_seen": images_seen(trainer, module, data),
        "start": start,
        "teacher": None if task.teacher is None else module.told(),
        "backbone": str(backbone),
        "initial_backbone": str(config.backbone),
        "pretrained": encoder.metadata.get("pretrained", config.backbone != "random"),
        **provenance(config, overrides),
    }
    write_summary(run_dir, summary)
    top1, low, high, top5 = (
        100 * share
        for share in (summary["finetune_top1"], *summary["finetune_top1_interval"], summary["finetune_top5"])
    )
    console.print(
        f"fine-tuned top-1 {top1:.2f} % [{low:.2f}, {high:.2f}], top-5 {top5:.2f} % ({len(rows)} labelled and"
        f" {len(evaluate.right)} held-out images of {whole.name}, {metrics.seconds:.0f} s) -> {run_dir}/summary.json",
        markup=False,
    )
    return summary


def kept_projector(config: DictConfig, encoder: Encoder) -> nn.Sequential | None:
    """The projector's first layer for ``task.from=projector``, else None.

    Raises:
        UserError: if the backbone's file has none, or of another width.
    """
    where = config.task["from"]
    if where not in ("backbone", "projector"):
        raise UserError(f"task.from={where} is neither backbone nor projector")
    if where == "backbone":
        return None
    name = str(config.backbone)
    projector = None if name == "random" or name.startswith("timm/") else load_projector(name)
    if projector is None:
        raise UserError(
            f"task.from=projector, but backbone={name} keeps no projector; pretrain with method=simclr_v2, or set"
            " task.from=backbone"
        )
    if projector[0].in_features != encoder.dim:
        raise UserError(
            f"backbone={name} has a projector for {projector[0].in_features} features, but its encoder gives"
            f" {encoder.dim}; set task.from=backbone"
        )
    return projector
