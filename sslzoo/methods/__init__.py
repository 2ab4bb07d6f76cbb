"""One file, one method: each is read beside its paper."""

from sslzoo.methods.byol import BYOL
from sslzoo.methods.cmc import CMC
from sslzoo.methods.cpc import CPC
from sslzoo.methods.dino import DINO
from sslzoo.methods.instdisc import InstDisc
from sslzoo.methods.invaspread import InvaSpread
from sslzoo.methods.moco import MoCo
from sslzoo.methods.moco_v3 import MoCoV3
from sslzoo.methods.simclr import SimCLR
from sslzoo.methods.simsiam import SimSiam
from sslzoo.methods.swav import SwAV

__all__ = ["BYOL", "CMC", "CPC", "DINO", "InstDisc", "InvaSpread", "MoCo", "MoCoV3", "SimCLR", "SimSiam", "SwAV"]
