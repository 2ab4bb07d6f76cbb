"""Detectors see what the encoder sees, train on images without boxes, and normalise their losses over the batch."""

import copy
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.ops import box_iou

from conftest import on_ranks
from sslzoo.blocks import Encoder, LabEncoder, PatchEncoder
from sslzoo.checkpoints import load_backbone, save_backbone
from sslzoo.downstream import detectors
from sslzoo.downstream.detectors import MODELS, RetinaNetHead, build
from sslzoo.errors import UserError

MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.25, 0.2]
SMALL = {"channels": 32, "convs": 2, "norm": "group", "rois": 16, "proposals": 20}
ENCODERS = {
    "resnet": lambda: Encoder("resnet10t", width=0.25),
    "small stem": lambda: Encoder("resnet10t", stem="small", width=0.25),
    "convnext": lambda: Encoder("convnext_atto", options={"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}),
    "swin": lambda: Encoder(
        "swin_tiny_patch4_window7_224",
        options={"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
    ),
    "vit": lambda: Encoder(
        "vit_tiny_patch16_224", options={"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 2}
    ),
    "lab": lambda: LabEncoder("resnet10t", stem="small", width=0.25),
    "patches": lambda: PatchEncoder("resnet10t", width=0.25, patch=32, stride=16),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]()


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.rand(3, *size) for size in sizes]


def targets(*boxes: list[list[float]], size: int = 64) -> list[dict]:
    """Boxes of the classes 1, 2, ...; masks that fill them."""
    found = []
    for each in boxes:
        corners = torch.tensor(each, dtype=torch.float).view(-1, 4)
        masks = torch.zeros(len(corners), size, size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, corners.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        found.append({"boxes": corners, "labels": torch.arange(1, len(corners) + 1), "masks": masks})
    return found


BOXES = [[4.0, 4, 30, 40], [20, 10, 60, 50]], []


def step(net: nn.Module, wanted: list[dict]) -> dict:
    """Losses and gradients of one training step."""
    losses = net.train()(images(*[(64, 64)] * len(wanted)), wanted)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}


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


@torch.no_grad()
def test_a_c4_detector_sees_the_third_map_and_its_head_goes_on_to_the_fourth():
    encoder = ENCODERS["resnet"]().eval()
    net = build("faster_rcnn_c4", encoder, 2, MEAN, STD, min_size=64, **SMALL).eval()
    x = torch.rand(2, 3, 64, 64)
    *_, c4, c5 = encoder.maps(x)
    assert torch.equal(net.backbone(x)["0"], c4)
    stage, extra = net.roi_heads.box_head
    assert torch.equal(stage(c4), c5)
    assert isinstance(extra, nn.BatchNorm2d)
    assert stage is encoder.net.layer4


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


def test_an_encoder_of_one_size_takes_others_with_the_same_weights():
    encoder = ENCODERS["vit"]()
    free = detectors.of_any_size(encoder)
    x = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(free.maps(x), encoder.maps(x), strict=True))
    assert free.maps(torch.rand(1, 3, 96, 128))[-1].shape == (1, 48, 6, 8)
    with pytest.raises(AssertionError):
        encoder.maps(torch.rand(1, 3, 96, 128))


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


@torch.no_grad()
def test_maps_lie_where_the_anchors_think(encoder):
    for model in ("retinanet", "faster_rcnn_fpn"):
        body = build(model, encoder, 2, MEAN, STD, min_size=96, **SMALL).backbone
        side = 4 * body.divisible
        maps = list(body(torch.rand(2, 3, side, side)).values())
        assert [tuple(level.shape) for level in maps] == [
            (2, 32, math.ceil(side / stride), math.ceil(side / stride)) for stride in body.strides
        ]


def test_images_of_the_right_size_are_not_resampled():
    net = build("retinanet", ENCODERS["resnet"](), 2, [0.0] * 3, [1.0] * 3, min_size=64, max_size=96, **SMALL)
    x = torch.rand(3, 64, 96)
    assert torch.equal(net.transform([x])[0].tensors[0], x)
    assert net.transform([torch.rand(3, 64, 192)])[0].image_sizes == [(32, 96)]


# Losses


def focal(logit: float, positive: bool) -> float:
    """Lin et al. 2017, eq. 5, with alpha = 0.25 and gamma = 2."""
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


def test_the_focal_loss_is_divided_by_the_batchs_positives():
    head = RetinaNetHead(8, 9, 3, 1, None)
    logits, deltas = torch.randn(3, 6, 3, dtype=torch.double), torch.randn(3, 6, 4, dtype=torch.double)
    anchors = [
        torch.tensor([[0.0, 0, 8, 8], [8, 0, 20, 9], [2, 3, 9, 9], [1, 1, 5, 7], [4, 4, 6, 8], [0, 0, 9, 9]])
    ] * 3
    found = [
        {"boxes": torch.tensor([[1.0, 1, 9, 9], [2, 2, 7, 8]]).double(), "labels": torch.tensor([2, 0])},
        {"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0, dtype=torch.long)},
        {"boxes": torch.tensor([[0.0, 0, 8, 9]]).double(), "labels": torch.tensor([1])},
    ]
    matched = [torch.tensor([0, -1, 1, -2, 1, -1]), torch.full((6,), -1), torch.tensor([-1, -1, -2, 0, -1, -1])]
    output = {"cls_logits": logits, "bbox_regression": deltas}
    losses = head.compute_loss(found, output, [a.double() for a in anchors], matched)
    classification = regression = 0.0
    for image, rows in enumerate(matched):
        for anchor, row in enumerate(rows.tolist()):
            if row == -2:
                continue
            label = found[image]["labels"][row].item() if row >= 0 else None
            classification += sum(focal(logits[image, anchor, c].item(), c == label) for c in range(3))
            if row >= 0:
                x1, y1, x2, y2 = found[image]["boxes"][row].tolist()
                a1, b1, a2, b2 = anchors[image][anchor].tolist()
                w, h = a2 - a1, b2 - b1
                wanted = ((x1 + x2 - a1 - a2) / 2 / w, (y1 + y2 - b1 - b2) / 2 / h)
                wanted += (math.log((x2 - x1) / w), math.log((y2 - y1) / h))
                regression += sum(abs(d - t) for d, t in zip(deltas[image, anchor].tolist(), wanted, strict=True))
    assert losses["classification"].item() == pytest.approx(classification / 4, rel=1e-6)
    assert losses["bbox_regression"].item() == pytest.approx(regression / 4, rel=1e-6)


def half_of_a_loss(rank: int) -> float:
    """The losses of a batch of two, or of one of its images where there are two ranks."""
    torch.manual_seed(0)
    head = RetinaNetHead(8, 9, 3, 1, None)
    logits, deltas, corners = torch.randn(2, 6, 3), torch.randn(2, 6, 4), 9 * torch.rand(6, 2)
    anchors = [torch.cat([corners, corners + 3], 1)] * 2
    found = [
        {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    matched = [torch.tensor([0, -1, 0, -2, 0, -1]), torch.full((6,), -1)]
    mine = slice(None) if rank < 0 else slice(rank, rank + 1)
    output = {"cls_logits": logits[mine], "bbox_regression": deltas[mine]}
    losses = head.compute_loss(found[mine], output, anchors[mine], matched[mine])
    return sum(loss.item() for loss in losses.values())


def test_two_ranks_have_the_loss_of_one_though_one_of_them_has_no_boxes():
    assert sum(on_ranks(2, half_of_a_loss)) / 2 == pytest.approx(half_of_a_loss(-1), rel=1e-5)


def test_an_empty_image_does_not_dominate_the_loss():
    net = build("retinanet", ENCODERS["resnet"](), 2, MEAN, STD, min_size=64, **SMALL)
    nn.init.constant_(net.head.classification_head.cls_logits.bias, -2.0)  # every anchor costs something
    with torch.no_grad():
        x = images((64, 64))
        alone = net.train()(x, targets(BOXES[0]))["classification"]
        beside = copy.deepcopy(net)(x * 2, targets(*BOXES))["classification"]
    assert beside < 2.5 * alone  # torchvision's own: by the number of positives, some tens


def test_labels_count_from_one_inside_and_out():
    for model in ("retinanet", "fcos"):
        net = build(model, ENCODERS["resnet"](), 2, MEAN, STD, min_size=64, score=0.0, **SMALL)
        nn.init.zeros_(net.head.classification_head.cls_logits.weight)
        bias = net.head.classification_head.cls_logits.bias
        bias.data = torch.tensor([-9.0, 5.0]).repeat(len(bias) // 2)  # the last class, everywhere
        (found,) = net.eval()(images((64, 64)))
        assert set(found["labels"].tolist()) == {2}
        wrong, right = targets([[8.0, 8, 40, 40]], [[8.0, 8, 40, 40]])
        wrong["labels"], right["labels"] = torch.tensor([1]), torch.tensor([2])
        x = images((64, 64))
        assert net.train()(x, [right])["classification"] < net(x, [wrong])["classification"]


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


def test_maps_too_fine_for_a_pyramid_are_refused():
    encoder = PatchEncoder("resnet10t", stem="small", width=0.25, patch=16, stride=8, stages=2)
    with pytest.raises(UserError, match=r"maps at strides \[1, 2\], of which no pyramid from 4 upwards"):
        build("retinanet", encoder, 2, MEAN, STD, min_size=96, **SMALL)
