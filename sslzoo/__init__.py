"""sslzoo: self-supervised pretraining for vision, and everything done with the backbone afterwards."""

__version__ = "0.1.0"
