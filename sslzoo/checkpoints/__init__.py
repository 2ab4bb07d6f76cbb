"""Weights on disk: what a run leaves, and what comes from elsewhere."""

from sslzoo.checkpoints.backbone import load_backbone, read_metadata, save_backbone

__all__ = ["load_backbone", "read_metadata", "save_backbone"]
