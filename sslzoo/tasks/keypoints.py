"""Train a network that finds keypoints on a backbone, and score it on held-out objects."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from sslzoo.blocks import Encoder
from sslzoo.config import built, plain
from sslzoo.data.box_module import Boxes, box_example
from sslzoo.data.box_set import BoxSet
from sslzoo.data.point_sets import load_points, load_with_points
from sslzoo.data.points import PointSet, objects, point_example
from sslzoo.dist import rank
from sslzoo.downstream import keypoint_rcnn, keypoints
from sslzoo.downstream.average_precision import coco_scores, write_results
from sslzoo.downstream.detection import Detection, first_batches
from sslzoo.downstream.detection import predict as detect
from sslzoo.downstream.evaluate import Evaluate
from sslzoo.downstream.keypoints import Keypoints, predict
from sslzoo.downstream.point_scores import check_scores, matched, point_scores, score
from sslzoo.downstream.precise_bn import check_images, estimate_batchnorm
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.optim import Optim
from sslzoo.report.keypoints import curves, predictions
from sslzoo.report.progress import console
from sslzoo.tasks import dense
from sslzoo.tasks.dense import held_out, leave_out_unused
from sslzoo.tasks.runs import backbone_and_config, provenance, write_summary
from sslzoo.tasks.training import (
    refuse_pretraining,
    resumed,
    tell_skipped,
)

MODELS = (*keypoints.MODELS, "keypoint_rcnn")
# What the two builders' arguments are called in conf/task/keypoints.yaml: the same
BUILT = ("deconvs", "channels", "sigma")
BUILT_RCNN = ("min_size", "max_size", "channels", "convs", "norm", "rois", "proposals", "score", "iou", "detections")
VIEW = ("flip", "scale", "shift", "rotate")  # and point_example's


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Train ``config.task.model`` on ``config.backbone``; leave its scores, curves and pictures."""
    checkpoint = None
    if config.resume is not None:
        config, checkpoint = resumed(config, overrides)
    check(config, overrides)
    task = config.task
    pl.seed_everything(config.seed, verbose=False)
    encoder, sized = backbone_and_config(OmegaConf.merge(config, {}))
    pl.seed_everything(config.seed, verbose=False)  # heads start alike, whatever the backbone
    prepare = detecting if task.model == "keypoint_rcnn" else placing
    module, data, examples, look, found_in = prepare(config, sized, encoder)
    module.seed = config.seed

    def estimated(module: Method) -> dict:
        estimate_batchnorm(module, first_batches(data.loader, task.precise_bn))
        return look(module)

    evaluate = Evaluate(estimated if task.precise_bn else look, task.every_epochs)
    images = f"{len(data.train)} of {data.train.name}"
    training = dense.train(module, data, images, evaluate, ("PCK", "pck"), config, overrides, checkpoint)
    run_dir, trainer = training.run_dir, training.trainer
    found = found_in(module, run_dir)  # by all ranks together
    if not trainer.is_global_zero:
        return {}

    title = f"{task.model} on {encoder.metadata['method']}, {data.train.name}, seed {config.seed}"
    curves(training.rows.rows, run_dir / "curves.png", title)
    predictions(run_dir / "predictions.png", examples, found, title)
    summary = {
        "task": "keypoints",
        "method": encoder.metadata["method"],
        "data": data.train.name,
        "model": task.model,
        **{name: evaluate.values.get(name) for name in ("nme", "pck")},
        **evaluate.values,
        "normalise": task.normalise,
        "pck_at": task.pck,
        "points": len(examples.names),
        "val_objects": len(examples),
        **dense.effort(training, module, data),
        **dense.origin(config, encoder, data.train, data.val),
        **provenance(config, overrides),
    }
    write_summary(run_dir, summary)
    tell_skipped(data.skipped)
    report(summary, run_dir)
    return summary


def check(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse, by UserError, settings that mean nothing here."""
    refuse_pretraining(overrides, "keypoints", "task.optim.* or task.flip")
    if config.task.model not in MODELS:
        raise UserError(f"task.model={config.task.model} is none of {', '.join(MODELS)}")
    check_images(config.task.precise_bn)
    if config.data.label_list is not None:
        raise UserError("data.label_list names images to classify; for task=keypoints set data.label_fraction instead")
    if config.trainer.accumulate_grad_batches != 1:
        raise UserError("task=keypoints does not accumulate gradients: set trainer.accumulate_grad_batches=1")
    if config.data.batch_size < 2 and config.task.model == "heatmap":
        raise UserError("data.batch_size=1 leaves nothing to BatchNorm; set data.batch_size to 2 or more")


# A run: the module, its data, the held-out objects, from the module to its scores, and to the points of the objects
Run = tuple[Method, Boxes, PointSet, Callable[[Method], dict], Callable[[Method, Path], np.ndarray]]


def placing(config: DictConfig, sized: DictConfig, encoder: Encoder) -> Run:
    """Regression or heat maps of objects that are cut out.

    Raises:
        UserError: on settings or data that do not fit.
    """
    task, settings = config.task, plain(config.task)
    train, val = load_points(plain(config.data), config.seed)
    val = held_out(val, config.data.on_error)
    check_scores(val, task.normalise, task.pck)
    example = point_example(train, task.size, config.seed, **{name: settings[name] for name in VIEW})
    data = boxes(config, train, val, example)
    mean, std = list(sized.data.mean), list(sized.data.std)
    net = keypoints.build(task.model, encoder, len(train.names), mean, std, **{name: settings[name] for name in BUILT})
    net.to(next(encoder.parameters()).device).eval()
    leave_out_unused(encoder, lambda x: [net(x)], task.size, config.backbone, "task.size")
    module = Keypoints(net, built(task.optim, "task.optim", Optim, batch_size=data.batch_size), task.clip)

    def look(module: Method) -> dict:
        return score(val, predict(module, val, task.size), task.normalise, task.pck)

    def found_in(module: Method, run_dir: Path) -> np.ndarray:
        return predict(module, val, task.size).numpy()

    return module, data, val, look, found_in


def detecting(config: DictConfig, sized: DictConfig, encoder: Encoder) -> Run:
    """Keypoint R-CNN on whole images.

    Raises:
        UserError: on settings or data that do not fit.
    """
    task, settings = config.task, plain(config.task)
    train, val = load_with_points(plain(config.data), config.seed)
    val = held_out(val, config.data.on_error)
    examples = objects(val)
    check_scores(examples, task.normalise, task.pck)
    sizes = task.min_size
    size = sizes if isinstance(sizes, int) else sizes[-1]
    example = box_example(train, task.augment, size, config.seed, ("boxes", "labels", "keypoints"))
    data = boxes(config, train, val, example)
    mean, std = list(sized.data.mean), list(sized.data.std)
    net = keypoint_rcnn.build(
        encoder, len(examples.names), mean, std, **{name: settings[name] for name in BUILT_RCNN}
    ).to(next(encoder.parameters()).device)
    body = net.backbone.eval()
    side = -(-size // body.divisible) * body.divisible
    leave_out_unused(body.encoder, lambda x: body(x).values(), side, config.backbone, "task.min_size")
    module = Detection(net, built(task.optim, "task.optim", Optim, batch_size=data.batch_size), task.clip)

    def look(module: Method) -> dict:
        found = detect(module, val)
        rows, places = matched(val, found)
        scores = point_scores(places, val.keypoints[rows], examples.normalisers(task.normalise), task.pck)
        scores["found"] = float(np.isfinite(places).all((1, 2)).mean())
        scores |= {f"oks_{name}": value for name, value in coco_scores(val, found, iou="keypoints").items()}
        return {name: value for name, value in scores.items() if value >= 0}

    def found_in(module: Method, run_dir: Path) -> np.ndarray:
        found = detect(module, val)
        if not rank():
            write_results(run_dir / "results.json", val, found, iou="keypoints")
        return matched(val, found)[1]

    return module, data, examples, look, found_in


def boxes(config: DictConfig, train: BoxSet | PointSet, val: BoxSet | PointSet, example) -> Boxes:
    """Batches as ``config.data`` asks for them."""
    data = config.data
    return Boxes(train, val, example, data.batch_size, seed=config.seed, workers=data.workers, on_error=data.on_error)


def report(summary: dict, run_dir: Path) -> None:
    """The lines a run ends with."""
    nme = "unknown" if summary["nme"] is None else f"{100 * summary['nme']:.2f} %"
    pck = "unknown" if summary["pck"] is None else f"{100 * summary['pck']:.1f} %"
    oks = f", OKS AP {100 * summary['oks_map']:.1f}" if "oks_map" in summary else ""
    console.print(
        f"NME {nme}, PCK at {summary['pck_at']:g} {pck}{oks} (by {summary['normalise']}, {summary['scored_points']}"
        f" points of {summary['val_objects']} held-out objects of {summary['data']})"
    )
    written = ", ".join(sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".")))
    console.print(f"{summary['steps']} steps in {summary['seconds']:.0f} s -> {run_dir}: {written}")
