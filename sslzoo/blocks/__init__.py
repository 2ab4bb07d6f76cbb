"""Parts that methods borrow: encoders, heads, the trailing copy."""

from sslzoo.blocks.ema import EMA
from sslzoo.blocks.encoder import Encoder
from sslzoo.blocks.heads import MLP

__all__ = ["EMA", "MLP", "Encoder"]
