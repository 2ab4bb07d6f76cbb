"""Parts that methods borrow: encoders, heads, the trailing copy."""

import sslzoo.blocks.sk  # noqa: F401  (timm learns the names of selective-kernel networks)
from sslzoo.blocks.crops import by_resolution
from sslzoo.blocks.ema import EMA
from sslzoo.blocks.encoder import Encoder
from sslzoo.blocks.heads import MLP
from sslzoo.blocks.patches import PatchEncoder
from sslzoo.blocks.split import LabEncoder

__all__ = ["EMA", "MLP", "Encoder", "LabEncoder", "PatchEncoder", "by_resolution"]
