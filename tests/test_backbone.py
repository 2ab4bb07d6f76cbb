"""What a run leaves can be used again; what is no backbone is refused in one line; timm with and without a network."""

import json
import logging

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sslzoo.blocks import Encoder, LabEncoder
from sslzoo.checkpoints import load_backbone, read_metadata, save_backbone
from sslzoo.errors import UserError

WHERE = {"method": "moco", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": 32, "config_hash": "0" * 12}
VIT = {"name": "vit_tiny_patch16_224", "options": {"img_size": 32, "patch_size": 8, "depth": 4}}
KINDS = {
    "resnet": lambda: Encoder("resnet18", stem="small", width=0.25, options={"zero_init_last": False}),
    "vit": lambda: Encoder(**VIT),
    "lab": lambda: LabEncoder("resnet10t", stem="small", width=0.25),
}


def trained(encoder: Encoder) -> Encoder:
    """Weights and BatchNorm statistics that no initialisation has."""
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
        encoder.train()(torch.randn(8, 3, 32, 32))
    return encoder.eval()


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    encoder = trained(KINDS[request.param]())
    path = tmp_path_factory.mktemp("backbones") / "backbone.safetensors"
    return encoder, save_backbone(encoder, path, **WHERE)


@torch.no_grad()
def test_a_saved_backbone_gives_the_same_features_to_the_bit(saved):
    encoder, path = saved
    loaded = load_backbone(str(path))
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(x), encoder(x))
    assert type(loaded) is type(encoder)
    assert loaded.config == encoder.config
    assert not loaded.training
    for name, value in encoder.net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value), name


def test_the_file_says_what_it_is_and_loading_tells(saved):
    encoder, path = saved
    metadata = read_metadata(path)
    assert {key: metadata[key] for key in WHERE} == WHERE
    assert metadata["encoder"] == encoder.config
    assert load_backbone(path).metadata == metadata


def test_a_backbone_can_go_on_training(saved):
    _, path = saved
    loaded = load_backbone(path).train()
    loaded(torch.randn(4, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def rewritten(path, target, change=lambda weights: None, **metadata):
    """The file with other tensors or metadata; None takes an entry out."""
    with safe_open(path, framework="pt") as file:
        words = file.metadata() | metadata
    weights = load_file(path)
    change(weights)
    save_file(weights, target, metadata={key: value for key, value in words.items() if value is not None})
    return target


def first_of(weights):
    return sorted(weights)[0]


def refused(path, told):
    with pytest.raises(UserError, match=told) as error:
        load_backbone(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_backbone_are_refused(saved, tmp_path):
    _, path = saved
    refused(tmp_path / "missing.safetensors", "is no file; give a run's backbone.safetensors, random, or timm/NAME")
    refused(tmp_path, "is no file")
    other = tmp_path / "other.safetensors"
    for content in (b"", b"hello", path.read_bytes()[: path.stat().st_size // 2], path.read_bytes()[:100]):
        other.write_bytes(content)
        refused(other, "is no safetensors file")
    save_file({"w": torch.zeros(2)}, other)
    refused(other, "was not written by sslzoo")
    save_file({"w": torch.zeros(2)}, other, metadata={"format": "pt"})
    refused(other, "was not written by sslzoo")
    refused(rewritten(path, other, encoder=None), "was not written by sslzoo")


def test_files_that_do_not_fit_their_own_encoder_are_refused(saved, tmp_path):
    _, path = saved
    other = tmp_path / "other.safetensors"
    refused(rewritten(path, other, lambda w: w.pop(first_of(w))), "1 tensors differ, first")
    refused(rewritten(path, other, lambda w: w.update(extra=torch.zeros(1))), "1 tensors differ, first extra")
    refused(rewritten(path, other, lambda w: w.update({first_of(w): torch.zeros(1, 2)})), "1 tensors differ")
    refused(rewritten(path, other, kind="EMA"), "kind EMA, none of Encoder, LabEncoder, PatchEncoder; update sslzoo")
    refused(rewritten(path, other, kind=None), "kind None")


def test_a_file_of_an_encoder_that_timm_no_longer_knows_is_refused(saved, tmp_path):
    encoder, path = saved
    config = json.dumps(encoder.config | {"name": "resnet_of_old"})
    with pytest.raises(UserError, match="resnet_of_old is no timm model"):
        load_backbone(rewritten(path, tmp_path / "old.safetensors", encoder=config))


def test_random_is_the_encoder_asked_for_at_its_initialisation():
    torch.manual_seed(3)
    found = load_backbone("random", encoder={"name": "resnet10t", "width": 0.25})
    torch.manual_seed(3)
    expected = Encoder("resnet10t", width=0.25)
    assert found.metadata == {"method": "random"}
    assert not found.training
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


# timm


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No weights at hand, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_timm_without_its_weights(caplog):
    with caplog.at_level(logging.WARNING):
        found = load_backbone("timm/resnet10t", pretrained=False)
    assert found.metadata == {"method": "timm/resnet10t", "pretrained": False}
    assert not caplog.records
    assert found.dim == 512


def test_auto_without_a_cache_says_once_that_it_starts_at_random_and_records_it(empty_cache, caplog):
    with caplog.at_level(logging.WARNING, logger="sslzoo"):
        found = load_backbone("timm/resnet10t")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("sslzoo")]
    assert "timm/resnet10t: no weights in the local cache" in line
    assert "pretrained=true fetches them" in line
    assert found.metadata == {"method": "timm/resnet10t", "pretrained": False}
    assert constants.HF_HUB_OFFLINE is True


def test_auto_asks_no_network_and_leaves_the_hub_client_as_it_was(monkeypatch, tmp_path):
    seen = []

    def create(*arguments, pretrained=False, **options):
        seen.append((pretrained, constants.HF_HUB_OFFLINE))
        if pretrained:
            raise OSError("no such file")
        return real(*arguments, **options)

    import timm

    real = timm.create_model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(timm, "create_model", create)
    load_backbone("timm/resnet10t")
    assert (True, True) in seen
    assert not any(pretrained and not offline for pretrained, offline in seen)
    assert constants.HF_HUB_OFFLINE is False


def test_insisting_on_weights_that_cannot_be_had_is_one_line(empty_cache):
    with pytest.raises(UserError, match=r"timm/resnet10t: its weights could not be fetched .*pretrained=auto") as error:
        load_backbone("timm/resnet10t", pretrained=True)
    assert "\n" not in str(error.value)


def test_weights_at_hand_are_taken_with_the_statistics_of_their_images(monkeypatch, tmp_path):
    import timm

    torch.manual_seed(7)
    donor = timm.create_model("resnet10t")
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    real = timm.create_model
    overlay = {"file": str(tmp_path / "model.safetensors")}

    def create(name, pretrained=False, **options):
        more = {"pretrained_cfg_overlay": overlay} if pretrained else {}
        return real(name, pretrained=pretrained, **more, **options)

    monkeypatch.setattr(timm, "create_model", create)
    for pretrained in (True, "auto"):
        found = load_backbone("timm/resnet10t", pretrained)
        assert torch.equal(found.net.layer1[0].conv1.weight, donor.layer1[0].conv1.weight)
        assert found.metadata["pretrained"] is True
        assert found.metadata["mean"] == list(donor.pretrained_cfg["mean"])
        assert found.metadata["std"] == list(donor.pretrained_cfg["std"])
        assert found.metadata["image_size"] == donor.pretrained_cfg["input_size"][-1]


@pytest.mark.parametrize("pretrained", [True, False, "auto"])
def test_an_unknown_timm_name_is_named_with_its_neighbours(pretrained):
    with pytest.raises(UserError, match="resnet51 is no timm model; near names: resne"):
        load_backbone("timm/resnet51", pretrained)


def test_an_unknown_wish_for_weights_is_refused():
    with pytest.raises(UserError, match="pretrained=maybe is none of true, false, auto"):
        load_backbone("timm/resnet10t", "maybe")
