"""Fine-tune a backbone on labels, all of them or a part, and score it on held-out images."""

from collections.abc import Sequence

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sslzoo.blocks import Encoder
from sslzoo.checkpoints.backbone import load_projector, save_backbone
from sslzoo.checkpoints.classifier import save_classifier
from sslzoo.config import config_hash
from sslzoo.data.subsets import as_list, labelled, part
from sslzoo.downstream.features import check_size
from sslzoo.downstream.finetune import Finetune
from sslzoo.downstream.interval import interval
from sslzoo.downstream.labels import labelled_rows
from sslzoo.errors import UserError
from sslzoo.report.progress import console
from sslzoo.tasks.runs import backbone_and_config, device, provenance, write_summary
from sslzoo.tasks.training import (
    effort,
    fit_batch,
    learn,
    leave_cores_to_views,
    own_optim,
    read_checkpoint,
    resumed,
    started,
    task_images,
)


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train ``config.backbone`` and a classifier on the labels; leave both, the list of labels used, and the score."""
    config, checkpoint = resumed(config, overrides)
    pl.seed_everything(config.seed, verbose=False)
    encoder, sized = backbone_and_config(OmegaConf.merge(config, {}))
    check_size(encoder, sized.image_size)
    projector = kept_projector(config, encoder)
    data = task_images(sized, overrides)
    whole, settings = data.train, config.data
    rows = labelled(whole, settings.label_fraction, settings.label_list, config.seed)
    data.train = part(whole, rows)
    labelled_rows("finetune", data.train, data.val)
    fit_batch(data)
    optim, task = own_optim(config, data), config.task
    module = Finetune(encoder, len(whole.classes), optim, projector, task.layer_decay, task.head_lr_scale)
    module.seed = config.seed
    module.parameter_groups()  # complains now, not after the run directory is claimed
    leave_cores_to_views(device(config)[0], config)
    state = read_checkpoint(checkpoint, module, f"task=finetune of {config.backbone}") if checkpoint else None
    run_dir = started(config, overrides, as_list(whole, rows))
    console.print(f"finetune {config.backbone} on {len(rows)} labelled images of {whole.name}, {run_dir}")

    trainer, metrics, evaluate = learn(module, data, config, run_dir, state, checkpoint)
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
        projector=projector,
    )
    save_classifier(module.classifier, run_dir / "classifier.safetensors", whole.classes)
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
