"""The backbone a run leaves: safetensors, with all that is needed to use it again."""

import json
import logging
from contextlib import contextmanager, nullcontext
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sslzoo import __version__
from sslzoo.blocks import MLP, Encoder, LabEncoder, PatchEncoder
from sslzoo.checkpoints.files import write_whole
from sslzoo.errors import UserError

log = logging.getLogger(__name__)

KINDS = {kind.__name__: kind for kind in (Encoder, LabEncoder, PatchEncoder)}
PROJECTOR = "projector/"  # begins the names of its tensors; no tensor of a timm model has a slash


def save_backbone(
    encoder: Encoder,
    path: str | Path,
    method: str,
    mean: list[float],
    std: list[float],
    image_size: int,
    config_hash: str,
    projector: nn.Sequential | None = None,
) -> Path:
    """Write ``encoder`` and its metadata: how to build it, and what its images looked like.

    ``projector``: its first layer (linear, norm, ReLU), kept for fine-tuning; see ``load_projector``.
    """
    tensors = dict(encoder.net.state_dict())
    if projector is not None:
        tensors |= {PROJECTOR + name: tensor for name, tensor in projector.state_dict().items()}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": "sslzoo",
        "version": __version__,
        "kind": type(encoder).__name__,
        "encoder": encoder.config,
        "mean": list(mean),
        "std": list(std),
        "image_size": image_size,
        "method": method,
        "config_hash": config_hash,
    }
    as_strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return write_whole(path, lambda partial: save_file(weights, partial, metadata=as_strings))


def read_metadata(path: str | Path) -> dict:
    """The metadata of a ``backbone.safetensors``.

    Raises:
        UserError: if there is no such file, or sslzoo did not write it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"backbone={path} is no file; give a run's backbone.safetensors, random, or timm/NAME")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); give a run's backbone.safetensors") from error
    if metadata.get("format") != "sslzoo" or "encoder" not in metadata:
        raise UserError(f"{path} was not written by sslzoo: its metadata does not say how to build the encoder")
    plain = ("format", "version", "kind", "method", "config_hash")
    return {key: value if key in plain else json.loads(value) for key, value in metadata.items()}


def load_backbone(path_or_name: str | Path, pretrained: bool | str = "auto", encoder: dict | None = None) -> Encoder:
    """The encoder of a run, of timm, or at random.

    Args:
        path_or_name: a ``backbone.safetensors``, ``timm/NAME``, or ``random``.
        pretrained: for timm: True insists on timm's weights, False leaves them, ``auto`` takes them where the
            local cache has them and says so where it has not.
        encoder: the arguments of ``Encoder`` for ``random`` (default: resnet50).

    Returns:
        An Encoder in eval mode; its ``metadata`` holds at least ``method``, and ``mean``, ``std`` and
        ``image_size`` where they are known.

    Raises:
        UserError: if the file is missing, foreign, or does not fit the encoder it names.
    """
    name = str(path_or_name)
    if name == "random":
        built = Encoder(**(encoder or {}))
        built.metadata = {"method": "random"}
    elif name.startswith("timm/"):
        built = _from_timm(name.removeprefix("timm/"), pretrained)
    else:
        built = _from_file(Path(path_or_name))
    return built.eval()


def load_projector(path: str | Path) -> nn.Sequential | None:
    """The projector's first layer that a run kept beside its encoder, ``(B, D) -> (B, d)``; None where it kept none.

    Raises:
        UserError: if its tensors are not those of a linear layer and its norm.
    """
    read_metadata(path)
    with safe_open(path, framework="pt") as file:
        kept = [name for name in file.keys() if name.startswith(PROJECTOR)]  # noqa: SIM118 no mapping
        weights = {name.removeprefix(PROJECTOR): file.get_tensor(name) for name in kept}
    if not weights:
        return None
    try:
        width, dim = weights["0.weight"].shape
        projector = nn.Sequential(*MLP(dim, width, last_norm="batch"), nn.ReLU(inplace=True))
        projector.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} has a projector that is no linear layer with its norm; the file is damaged") from error
    return projector.eval()


def _from_file(path: Path) -> Encoder:
    metadata = read_metadata(path)
    kind = metadata.get("kind")
    if kind not in KINDS:
        raise UserError(f"{path} holds an encoder of kind {kind}, none of {', '.join(KINDS)}; update sslzoo")
    built = KINDS[kind](**metadata["encoder"])
    weights = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(PROJECTOR)}
    expected = built.net.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys()) or [
        key for key, value in expected.items() if value.shape != weights[key].shape
    ]
    if wrong:
        raise UserError(
            f"{path} does not fit its own encoder {metadata['encoder']['name']}: {len(wrong)} tensors differ,"
            f" first {wrong[0]}; the file is damaged or timm changed the model"
        )
    built.net.load_state_dict(weights)
    built.metadata = metadata
    return built


def _from_timm(name: str, pretrained: bool | str) -> Encoder:
    if pretrained not in (True, False, "auto"):
        raise UserError(f"pretrained={pretrained} is none of true, false, auto")
    loaded = False
    if pretrained:
        try:
            with _offline() if pretrained == "auto" else nullcontext():
                built, loaded = Encoder(name, pretrained=True), True
        except UserError:
            raise
        except Exception as error:  # timm and its hub raise many kinds where weights are not at hand
            if pretrained is True:
                raise UserError(
                    f"timm/{name}: its weights could not be fetched ({type(error).__name__});"
                    " check the name and the connection, or set pretrained=auto to start at random where there are none"
                ) from error
            log.warning(
                "timm/%s: no weights in the local cache (%s), so it starts at random; pretrained=true fetches them",
                name,
                type(error).__name__,
            )
    if not loaded:
        built = Encoder(name)
    settings = built.net.pretrained_cfg
    built.metadata = {"method": f"timm/{name}", "pretrained": loaded}
    if loaded:
        built.metadata |= {
            "mean": list(settings["mean"]),
            "std": list(settings["std"]),
            "image_size": settings["input_size"][-1],
        }
    return built


@contextmanager
def _offline():
    """Keep the hub client to its local cache."""
    was, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was
