"""Fine-tuning: a pretrained network and a new classifier learn from labels (SimCLR v2, sec. 2, arXiv 2006.10029)."""

from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslzoo.blocks import Encoder
from sslzoo.downstream.base import Downstream
from sslzoo.errors import UserError
from sslzoo.losses import full
from sslzoo.method import Batch
from sslzoo.optim import Optim

VIT_DECAY = 0.75  # MAE, table 9


class Finetune(Downstream):
    """Cross entropy of a linear classifier on top of the encoder, all of it trained.

    Args:
        encoder: f, pretrained.
        classes: C.
        optim: the optimizer.
        projector: first layers of the pretrained projector, tuned too (SimCLR v2); none by default.
        layer_decay: the rate of each layer is that of the one above times this (BEiT, appendix; a ResNet's layers are
            its stages); None: 0.75 for a ViT, 1 for others.
        head_lr_scale: the classifier's rate is ``optim.lr`` times this (SwAV: 20 for 10 % of ImageNet's labels).

    Raises:
        UserError: on a layer decay that is none, or an encoder that has no layers to order.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        optim: Optim | None = None,
        projector: nn.Sequential | None = None,
        layer_decay: float | None = None,
        head_lr_scale: float = 1.0,
    ):
        super().__init__(encoder, optim)
        self.projector = projector or nn.Sequential()
        dim = self.projector[0].out_features if len(self.projector) else encoder.dim
        self.classifier = classifier(dim, classes)
        if layer_decay is None:
            layer_decay = VIT_DECAY if isinstance(encoder.net, VisionTransformer) else 1.0
        if not 0 < layer_decay <= 1:
            raise UserError(f"task.layer_decay={layer_decay} is no share of a rate; give more than 0 and at most 1")
        self.layer_decay, self.head_lr_scale = layer_decay, head_lr_scale
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.projector(self.encoder(x)))

    def loss(self, batch: Batch) -> Tensor:
        """Labels are classes, ``(B,)`` int64, or probabilities of all classes, ``(B, C)`` (soft pseudo-labels)."""
        (x,) = batch.views
        scores, label = full(self(x)), batch.label
        return cross_entropy(scores, label.to(scores.dtype) if label.is_floating_point() else label)

    def parameter_groups(self) -> list[dict]:
        head = self.optim.groups(self.classifier.parameters(), lr_scale=self.head_lr_scale)
        tuned = self.optim.groups(self.projector.parameters(), lr_scale=1.0)
        for parameters, scale in layers(self.encoder, self.layer_decay):
            tuned += self.optim.groups(parameters, lr_scale=scale)
        return [group for group in head + tuned if group["params"]]


def classifier(dim: int, classes: int) -> nn.Linear:
    """A new linear classifier that at first prefers no class."""
    linear = nn.Linear(dim, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


def layers(encoder: Encoder, decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """The encoder's parameters by layer, and the scale of each layer's rate: ``decay`` for the last, its powers below.

    Layers are timm's: the blocks of a ViT, the stages of a ResNet. With ``decay=1`` there is one.
    """
    if decay == 1:
        return [(list(encoder.parameters()), 1.0)]
    matcher = getattr(encoder.net, "group_matcher", None)
    if matcher is None:
        raise UserError(
            f"task.layer_decay={decay} needs a network in layers, {type(encoder).__name__} has two side by side;"
            " set task.layer_decay=1"
        )
    depth = group_parameters(encoder.net, matcher(coarse=True), reverse=True)  # name -> 0 for the stem, 1, ...
    last = max(depth.values())
    of_layer: dict[int, list[nn.Parameter]] = {}
    for name, parameter in encoder.net.named_parameters():
        of_layer.setdefault(depth[name], []).append(parameter)
    return [(parameters, decay ** (last + 1 - i)) for i, parameters in sorted(of_layer.items())]
