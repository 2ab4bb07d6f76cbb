"""One file, one method: each is read beside its paper."""

from sslzoo.methods.moco import MoCo

__all__ = ["MoCo"]
