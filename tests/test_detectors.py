"""Detectors see what the encoder sees, and train on any of them, on images without boxes too."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.ops import box_iou

from detecting import BOXES, ENCODERS, MEAN, SMALL, STD, images, step, targets
from sslzoo.blocks import Encoder
from sslzoo.checkpoints import load_backbone, save_backbone
from sslzoo.downstream.detectors import MODELS, build
from sslzoo.errors import UserError


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]()


# What the detector sees


@torch.no_grad()
def test_a_detector_sees_the_encoders_own_maps_to_the_bit(encoder):
    encoder.eval()
    x = torch.rand(2, 3, 64, 64)
    own = encoder.maps((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    net = build("retinanet", encoder, 2, MEAN, STD, min_size=64, **SMALL).eval()
    seen = []
    net.backbone.neck.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    net(list(x))
    assert len(seen) == len(own) == len(encoder.widths)
    assert all(torch.equal(a, b) for a, b in zip(seen, own, strict=True))


def test_the_detector_trains_the_very_weights_that_were_loaded(tmp_path):
    encoder = ENCODERS["vit"]()
    with torch.no_grad():
        for p in encoder.parameters():
            p.normal_()
    where = {"method": "moco", "mean": MEAN, "std": STD, "image_size": 64, "config_hash": ""}
    path = save_backbone(encoder, tmp_path / "backbone.safetensors", **where)
    inside = build("fcos", load_backbone(path), 2, MEAN, STD, min_size=96, **SMALL).backbone.encoder
    weights = load_file(path)
    assert inside.net.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in inside.net.state_dict().items())
    assert all(p.requires_grad for p in inside.parameters())
    assert inside.metadata["method"] == "moco"


@pytest.mark.parametrize("change", [lambda w: w.pop("layer1.0.conv1.weight"), lambda w: w.update(x=torch.zeros(1))])
def test_weights_that_do_not_fit_are_refused_and_never_become_a_random_start(tmp_path, change):
    where = {"method": "moco", "mean": MEAN, "std": STD, "image_size": 64, "config_hash": ""}
    path = save_backbone(ENCODERS["resnet"](), tmp_path / "backbone.safetensors", **where)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata=metadata)
    with pytest.raises(UserError, match="does not fit its own encoder"):
        load_backbone(path)


# Every detector on every kind of encoder


@pytest.mark.parametrize("model", MODELS)
def test_a_step_on_a_batch_with_an_empty_image_and_boxes_afterwards(model):
    net = build(model, ENCODERS["resnet"](), 3, MEAN, STD, min_size=64, score=0.0, detections=5, **SMALL)
    losses = step(net, targets(*BOXES))
    assert all(math.isfinite(loss) for loss in losses.values())
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert not [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()]
    assert gradients["backbone.encoder.net.conv1.weight"].abs().sum() > 0
    assert next(name for name, _ in net.named_modules() if name.endswith("layer4")) == "backbone.encoder.net.layer4"
    found = net.eval()(images((64, 64), (48, 80)))
    for each, (height, width) in zip(found, [(64, 64), (48, 80)], strict=True):
        assert each["boxes"].shape == (5, 4)
        assert (each["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert each["labels"].min() >= 1
        assert each["labels"].max() <= 3
        assert (each["scores"].diff() <= 0).all()
        if model.startswith("mask"):
            assert each["masks"].shape == (5, 1, height, width)


@pytest.mark.parametrize("model", ["fcos", "faster_rcnn_fpn"])
def test_detectors_train_on_any_encoder(encoder, model):
    net = build(model, encoder, 2, MEAN, STD, min_size=64, **SMALL)
    losses = step(net, targets(*BOXES))
    assert all(math.isfinite(loss) for loss in losses.values())
    found = next(p for p in net.backbone.encoder.parameters() if p.ndim > 1)
    assert found.grad.abs().sum() > 0


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_of_only_empty_images_has_finite_losses(model):
    net = build(model, ENCODERS["small stem"](), 2, MEAN, STD, min_size=64, **SMALL)
    assert all(math.isfinite(loss) for loss in step(net, targets([], [])).values())


def test_bfloat16_leaves_boxes_and_losses_in_float32():
    for model in ("retinanet", "mask_rcnn_fpn", "faster_rcnn_c4"):
        net = build(model, ENCODERS["resnet"](), 2, MEAN, STD, min_size=64, score=0.0, **SMALL)
        with torch.autocast("cpu", torch.bfloat16):
            losses = net.train()(images((64, 64)), targets(BOXES[0]))
            (found,) = net.eval()(images((64, 64)))
        assert all(loss.dtype == torch.float for loss in losses.values())
        assert found["boxes"].dtype == found["scores"].dtype == torch.float


# Levels and anchors


@pytest.mark.parametrize(
    ("model", "stem", "size", "strides", "smallest", "largest"),
    [
        ("retinanet", "imagenet", 800, [8, 16, 32, 64, 128], 32, 512),
        ("faster_rcnn_fpn", "imagenet", 800, [4, 8, 16, 32, 64], 32, 512),
        ("faster_rcnn_c4", "imagenet", 800, [16], 32, 512),
        ("retinanet", "imagenet", 96, [4, 8, 16, 32], 16, 128),
        ("retinanet", "small", 96, [4, 8, 16], 16, 64),
        ("faster_rcnn_fpn", "small", 96, [4, 8, 16], 16, 64),
        ("faster_rcnn_c4", "small", 96, [4], 96 / 25, 96 * 0.64),
    ],
)
def test_levels_and_anchors_follow_the_images_size(model, stem, size, strides, smallest, largest):
    net = build(model, Encoder("resnet10t", stem=stem, width=0.25), 2, MEAN, STD, min_size=size, **SMALL)
    anchors = net.anchor_generator if model == "retinanet" else net.rpn.anchor_generator
    assert net.backbone.strides == strides
    sizes = [side for level in anchors.sizes for side in level]
    assert min(sizes) == pytest.approx(smallest)
    assert max(level[0] if model == "retinanet" else level[-1] for level in anchors.sizes) == pytest.approx(largest)
    assert set(anchors.num_anchors_per_location()) == {{"retinanet": 9, "faster_rcnn_fpn": 3}.get(model, 15)}


def test_images_of_the_right_size_are_not_resampled():
    net = build("retinanet", ENCODERS["resnet"](), 2, [0.0] * 3, [1.0] * 3, min_size=64, max_size=96, **SMALL)
    x = torch.rand(3, 64, 96)
    assert torch.equal(net.transform([x])[0].tensors[0], x)
    assert net.transform([torch.rand(3, 64, 192)])[0].image_sizes == [(32, 96)]
    several = build("retinanet", ENCODERS["resnet"](), 2, MEAN, STD, min_size=[32, 64], max_size=96, **SMALL)
    assert several.eval().transform([x])[0].image_sizes == [(64, 96)]
    assert {several.train().transform([x])[0].image_sizes[0] for _ in range(20)} == {(32, 48), (64, 96)}


@torch.no_grad()
@pytest.mark.parametrize("model", ["retinanet", "faster_rcnn_fpn"])  # at its start FCOS has no boxes that overlap
def test_soft_suppression_keeps_what_hard_suppression_drops(model):
    encoder, x = ENCODERS["resnet"](), images((64, 64))
    found = []
    for nms in ("hard", "soft"):
        torch.manual_seed(0)
        net = build(model, encoder, 1, MEAN, STD, min_size=64, nms=nms, score=1e-6, detections=800, **SMALL).eval()
        found.append(net(x)[0])
    hard, soft = found
    overlaps = box_iou(hard["boxes"], hard["boxes"]).nan_to_num(0).fill_diagonal_(0)
    assert overlaps.max() <= 0.5
    assert len(soft["boxes"]) > len(hard["boxes"])
    assert (soft["scores"].diff() <= 0).all()


# Mistakes


@pytest.mark.parametrize(
    ("model", "encoder", "options", "message"),
    [
        ("yolo", "resnet", {}, "task.model=yolo is none of retinanet, fcos"),
        (
            "faster_rcnn_c4",
            "vit",
            {},
            "vit_tiny_patch16_224 as Encoder has none to give; set task.model=faster_rcnn_fpn",
        ),
        ("mask_rcnn_c4", "convnext", {}, "set task.model=mask_rcnn_fpn"),
        ("faster_rcnn_c4", "lab", {}, "resnet10t as LabEncoder has none to give"),
        ("faster_rcnn_c4", "patches", {}, "resnet10t as PatchEncoder has none to give"),
        ("retinanet", "resnet", {"norm": "batch"}, "set task.norm=group"),
        ("retinanet", "resnet", {"norm": "layer"}, "task.norm=layer is none of"),
        ("retinanet", "resnet", {"nms": "no"}, "task.nms=no is none of hard, soft"),
        ("retinanet", "resnet", {"max_size": 32}, "task.max_size=32 is less than task.min_size=64"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(model, encoder, options, message):
    with pytest.raises(UserError, match=message) as error:
        build(model, ENCODERS[encoder](), 2, MEAN, STD, **{"min_size": 64, **SMALL, **options})
    assert "\n" not in str(error.value)
