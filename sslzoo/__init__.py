"""sslzoo: self-supervised pretraining for vision, and everything done with the backbone afterwards."""

__version__ = "0.1.0"
__all__ = ["__version__", "load_backbone"]


def __getattr__(name: str):
    # Imported on first use, so that `python -m sslzoo --help` does not wait for torch.
    if name == "load_backbone":
        from sslzoo.checkpoints.backbone import load_backbone

        return load_backbone
    raise AttributeError(f"module 'sslzoo' has no attribute {name!r}")
