"""Any timm model as an encoder: one feature vector for methods, stage maps for detectors."""

from difflib import get_close_matches

import timm
import torch
from torch import Tensor, nn

from sslzoo.blocks.norm import group_norm_weight_standardisation
from sslzoo.blocks.vit import convolutional_stem
from sslzoo.errors import UserError

STEMS = ("imagenet", "small", "conv")
NORMS = ("batch", "group")


class Encoder(nn.Module):
    """A backbone without its classifier: ``(B, 3, H, W) -> (B, D)``.

    Args:
        name: a timm model, e.g. ``resnet50`` or ``vit_small_patch16_224``.
        stem: ``imagenet`` keeps the model's own; ``small`` gives a ResNet a 3x3 stride-1 first convolution and no
            max-pool, for images of 32 to 64 pixels (SimCLR, appendix B.9); ``conv`` gives a ViT convolutions in place
            of its patch projection and its last block (Xiao et al. 2021, arXiv 2106.14881).
        width: multiplies the channels of a ResNet (SimCLR's 2x and 4x, or a narrow net for a CPU).
        pretrained: timm's own weights, from the user's cache.
        norm: ``batch`` leaves the model's normalisation; ``group`` puts GroupNorm and standardised weights in place of
            BatchNorm (BYOL without batch statistics).
        options: further arguments of the timm model, e.g. ``{zero_init_last: false}``.

    Attributes:
        dim: D.
        widths: channels of each stage map.
        strides: input pixels per pixel of each stage map.
        config: the arguments above, enough to build the same encoder again.

    Raises:
        UserError: on a name timm does not know, or a stem or width that does not fit the model.
    """

    def __init__(
        self,
        name: str = "resnet50",
        stem: str = "imagenet",
        width: float = 1.0,
        pretrained: bool = False,
        norm: str = "batch",
        options: dict | None = None,
    ):
        super().__init__()
        self.metadata: dict = {}  # where the weights come from; see load_backbone
        self.config = {"name": name, "stem": stem, "width": width, "norm": norm, "options": dict(options or {})}
        for key, value, allowed in (("stem", stem, STEMS), ("norm", norm, NORMS)):
            if value not in allowed:
                raise UserError(f"encoder.{key}={value} is none of {', '.join(allowed)}")
        if not timm.is_model(name):
            near = get_close_matches(name, timm.list_models(), n=3)
            hint = f"; near names: {', '.join(near)}" if near else "; timm.list_models() lists them"
            raise UserError(f"encoder.name={name} is no timm model{hint}")
        self.net = _build(name, stem, width, pretrained, self.config["options"])
        if norm == "group":
            group_norm_weight_standardisation(self.net)
        self.dim: int = self.net.head_hidden_size
        stages = self.net.feature_info[-4:]
        shrink = 4 if stem == "small" else 1
        self.widths: list[int] = [stage["num_chs"] for stage in stages]
        self.strides: list[int] = [stage["reduction"] // shrink for stage in stages]
        self.to(memory_format=torch.channels_last)  # 1.1x to 1.6x on convolutions, no change in meaning

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The last four stages' maps: ``(B, 3, H, W) -> [(B, widths[s], H / strides[s], W / strides[s])]``."""
        return self.net.forward_intermediates(x, indices=len(self.widths), intermediates_only=True)


def _build(name: str, stem: str, width: float, pretrained: bool, options: dict) -> nn.Module:
    """The timm model with its stem and width changed where asked; both are defined for ResNets alone."""
    is_resnet = timm.models.resnet.ResNet is _class_of(name)
    if stem == "conv" and (width != 1 or pretrained):
        raise UserError("encoder.stem=conv is for ViTs trained from the start: leave encoder.width, pretrained=false")
    if (stem == "small" or width != 1) and not is_resnet:
        raise UserError(f"encoder.stem={stem} and encoder.width={width} are for ResNets, {name} is none: leave them")
    if width < 1 / 32:
        raise UserError(f"encoder.width={width} leaves no channels in the stem; set encoder.width to at least 0.04")
    if pretrained and (stem != "imagenet" or width != 1):
        raise UserError(f"pretrained weights of {name} fit encoder.stem=imagenet and encoder.width=1 only")
    if width == 1 or name.startswith("sk_"):  # selective-kernel networks have a width of their own
        of_width = {"width": int(width)} if width != 1 else {}
        net = timm.create_model(name, num_classes=0, pretrained=pretrained, **of_width, **options)
    else:
        channels = tuple(int(c * width) for c in (64, 128, 256, 512))
        # timm narrows the stem of its "deep" kind alone; the convolution it makes there is replaced below
        stem_of = {"channels": channels, "stem_type": "deep", "stem_width": channels[0] // 2}
        net = timm.create_model(name, num_classes=0, **stem_of, **options)
    if stem == "conv":
        convolutional_stem(net)
        return net
    first = net.bn1.num_features if is_resnet else 0
    if stem == "small":
        net.conv1 = nn.Conv2d(3, first, kernel_size=3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif width != 1 and not name.startswith("sk_"):
        net.conv1 = nn.Conv2d(3, first, kernel_size=7, stride=2, padding=3, bias=False)
    if stem == "small" or (width != 1 and not name.startswith("sk_")):
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


def _class_of(name: str) -> type:
    with torch.device("meta"):
        return type(timm.create_model(name, num_classes=0))
