"""Selective-kernel ResNets as in SimCLR v2 (Chen et al. 2020, arXiv 2006.10029), under names that timm then knows:
``sk_resnet50``, ``sk_resnet101``, ``sk_resnet152``, each with ``encoder.options={width: 3}`` where wished.

timm's own ``skresnet`` differs: its two streams have kernels of different reach, its mixing has other widths.
"""

from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from sslzoo.errors import UserError


class SKConv(nn.Module):
    """Two 3x3 convolutions mixed channel by channel, by weights that depend on the whole image.

    ``(B, before, H, W) -> (B, after, H / stride, W / stride)``; norm and ReLU are inside.

    Args:
        before: channels in.
        after: channels out.
        stride: of the convolutions.
        ratio: of the mixing network's hidden width to ``after``; it is at least ``min_dim``.
        min_dim: see there.
    """

    def __init__(self, before: int, after: int, stride: int = 1, ratio: float = 0.0625, min_dim: int = 32):
        super().__init__()
        hidden = max(int(after * ratio), min_dim)
        self.conv = nn.Conv2d(before, 2 * after, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2 * after)
        self.squeeze = nn.Conv2d(after, hidden, kernel_size=1, bias=False)
        self.squeeze_bn = nn.BatchNorm2d(hidden)
        self.mix = nn.Conv2d(hidden, 2 * after, kernel_size=1, bias=False)
        for layer in (self.conv, self.squeeze, self.mix):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        streams = self.bn(self.conv(x)).relu().unflatten(1, (2, -1))  # (B, 2, C, H, W)
        pooled = streams.sum(1).mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        mixing = self.mix(self.squeeze_bn(self.squeeze(pooled)).relu())  # (B, 2C, 1, 1)
        return (streams * mixing.unflatten(1, (2, -1)).softmax(1)).sum(1)


def _sk_resnet(blocks: tuple[int, ...], pretrained: bool, num_classes: int, width: int, sk_ratio: float) -> ResNet:
    """A timm ResNet-D whose 3x3 convolutions are selective, pooled at its borders as TensorFlow pools."""
    if pretrained:
        raise UserError("timm has no weights of sk_resnet; set pretrained=false")
    channels = tuple(c * width for c in (64, 128, 256, 512))
    stem = {"stem_type": "deep", "stem_width": channels[0] // 2, "avg_down": True}
    net = ResNet(Bottleneck, blocks, num_classes, channels=channels, **stem)
    net.maxpool = MaxPool2dSame(3, 2)
    # The first stage keeps its size and yet averages its shortcut; each window ends at the border.
    net.layer1[0].downsample[0] = nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            conv = block.conv2
            block.conv2 = SKConv(conv.in_channels, conv.out_channels, conv.stride[0], sk_ratio)
            block.bn2, block.act2 = nn.Identity(), nn.Identity()
    return net


@register_model
def sk_resnet50(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    num_classes: int = 1000,
    width: int = 1,
    sk_ratio: float = 0.0625,
) -> ResNet:
    """ResNet-50 with selective kernels; timm passes the arguments in the middle to all its models."""
    return _sk_resnet((3, 4, 6, 3), pretrained, num_classes, width, sk_ratio)


@register_model
def sk_resnet101(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    num_classes: int = 1000,
    width: int = 1,
    sk_ratio: float = 0.0625,
) -> ResNet:
    """ResNet-101 with selective kernels."""
    return _sk_resnet((3, 4, 23, 3), pretrained, num_classes, width, sk_ratio)


@register_model
def sk_resnet152(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    num_classes: int = 1000,
    width: int = 1,
    sk_ratio: float = 0.0625,
) -> ResNet:
    """ResNet-152 with selective kernels."""
    return _sk_resnet((3, 8, 36, 3), pretrained, num_classes, width, sk_ratio)
