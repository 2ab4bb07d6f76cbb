"""The classifier a fine-tuning run leaves beside its backbone: one linear layer, in safetensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sslzoo import __version__
from sslzoo.blocks import Encoder
from sslzoo.checkpoints.backbone import load_backbone, load_projector
from sslzoo.checkpoints.files import write_whole
from sslzoo.errors import UserError


def save_classifier(linear: nn.Linear, path: str | Path, classes: list[str]) -> Path:
    """Write ``linear``, which has an output for each of ``classes``."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in linear.state_dict().items()}
    metadata = {"format": "sslzoo", "version": __version__, "kind": "classifier", "classes": json.dumps(list(classes))}
    return write_whole(path, lambda partial: save_file(weights, partial, metadata=metadata))


def load_classifier(path: str | Path) -> tuple[nn.Linear, list[str]]:
    """A ``classifier.safetensors`` and the names of its classes.

    Raises:
        UserError: if there is no such file, or it holds no classifier of sslzoo.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give the directory of a task=finetune run, which has one")
    try:
        with safe_open(path, framework="pt") as file:
            classes = json.loads((file.metadata() or {})["classes"])
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is no classifier of sslzoo; give the directory of a task=finetune run") from error
    linear = nn.Linear(*reversed(weight.shape))
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear.eval(), classes


class Tuned(nn.Module):
    """What a fine-tuning run leaves, put together: ``(B, 3, H, W) -> (B, C)``.

    Attributes:
        encoder: the backbone.
        projector: the layers between it and the classifier, perhaps none.
        classifier: linear.
        classes: C names.
    """

    def __init__(self, encoder: Encoder, projector: nn.Module, classifier: nn.Linear, classes: list[str]):
        super().__init__()
        self.encoder, self.projector, self.classifier, self.classes = encoder, projector, classifier, classes

    def features(self, x: Tensor) -> Tensor:
        """What the classifier sees, ``(B, 3, H, W) -> (B, d)``."""
        return self.projector(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def load_tuned(run_dir: str | Path) -> Tuned:
    """The network of a fine-tuning run, in eval mode.

    Raises:
        UserError: if the directory is none of such a run, or its parts do not fit each other.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no directory; give that of a task=finetune run")
    classifier, classes = load_classifier(run_dir / "classifier.safetensors")
    path = run_dir / "backbone.safetensors"
    encoder, projector = load_backbone(path), load_projector(path) or nn.Sequential()
    dim = projector[0].out_features if len(projector) else encoder.dim
    if classifier.in_features != dim or classifier.out_features != len(classes):
        raise UserError(
            f"{run_dir}: classifier.safetensors takes {classifier.in_features} features and names {len(classes)} of"
            f" {classifier.out_features} classes, backbone.safetensors gives {dim} features; they are not of one run"
        )
    return Tuned(encoder, projector, classifier, classes).eval()
