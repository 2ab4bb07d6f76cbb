"""What a moving teacher labels, masks, pixels and images, and what its student learns from that."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from boxed import rectangles, write_coco
from conftest import on_ranks
from runs import archive, checkpoint_of, killed_before
from selftraining import summary_of, taught_steps
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.checkpoints.classifier import load_tuned
from sslzoo.config import composed
from sslzoo.data.box_module import BoxBatch
from sslzoo.data.box_set import IGNORE
from sslzoo.data.box_views import STRENGTHS, augmented
from sslzoo.data.boxes import load_boxes
from sslzoo.data.map_module import map_twin_example
from sslzoo.data.mixed import MixedBatch
from sslzoo.data.pseudo_maps import PseudoMaps
from sslzoo.downstream import segmenters
from sslzoo.downstream.detection import Detection, unit_range
from sslzoo.downstream.detectors import build
from sslzoo.downstream.finetune import Finetune
from sslzoo.downstream.segmentation import Segmentation
from sslzoo.downstream.taught import TaughtDetection, TaughtFinetune, TaughtSegmentation
from sslzoo.method import Batch
from sslzoo.moving_teacher import Moving, TaughtStudent
from sslzoo.optim import Optim
from sslzoo.report.csv_log import read_rows
from sslzoo.selftrain import LossBalance
from sslzoo.tasks.parts import averaged_weights, teacher_of, trained_weights
from sslzoo.views.draw import key

OPTIM = Optim(lr=0.01, lr_per=None)
ALWAYS = {"burn_in": 0.0, "threshold": 0.0}


def stages() -> Encoder:
    """Four small stages without BatchNorm: what it says of an image does not depend on the others."""
    return Encoder("convnext_atto", options={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)})


def masker(model: str) -> TaughtDetection:
    torch.manual_seed(0)
    encoder = Encoder("resnet10t", width=0.125)
    small = {"channels": 16, "convs": 1, "norm": "group", "rois": 8, "proposals": 10, "score": 0.0, "detections": 5}
    net = build(model, encoder, 2, [0.5] * 3, [0.25] * 3, min_size=64, max_size=64, **small)
    return TaughtDetection(Detection(net, OPTIM), LossBalance(), Moving(**{**ALWAYS, "threshold": 0.5}))


def of_ten_steps(module: TaughtStudent) -> TaughtStudent:
    module.steps = 10
    return module


def segmenter(**moving) -> TaughtSegmentation:
    torch.manual_seed(0)
    net = segmenters.build("fpn", stages(), 3, [0.5] * 3, [0.25] * 3, channels=8, norm="group")
    return of_ten_steps(TaughtSegmentation(Segmentation(net, OPTIM), LossBalance(), Moving(**{**ALWAYS, **moving})))


def classifier(soft: bool = True, **moving) -> TaughtFinetune:
    torch.manual_seed(0)
    learner = Finetune(stages(), 3, OPTIM)
    nn.init.normal_(learner.classifier.weight, std=0.3)  # at its start it prefers no class
    return of_ten_steps(TaughtFinetune(learner, LossBalance(), Moving(**{**ALWAYS, **moving}), soft))


def noise(images: int, seed: int, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (images, 3, size, size), generator=generator, dtype=torch.uint8)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# Masks


def found_in(boxes, scores, masks) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "scores": torch.tensor(scores),
        "labels": torch.ones(len(scores), dtype=torch.long),
        "masks": torch.stack(masks)[:, None],
    }


def area(box, value: float) -> Tensor:
    mask = torch.zeros(64, 64)
    mask[box[1] : box[3], box[0] : box[2]] = value
    return mask


@pytest.mark.parametrize("model", ["mask_rcnn_fpn", "mask_rcnn_c4"])
def test_sure_boxes_teach_their_masks_and_those_without_a_pixel_are_left_out(monkeypatch, model):
    module = masker(model)
    large, other = [2, 3, 40, 50], [10, 10, 30, 60]
    found = [
        found_in([large, other, large], [0.9, 0.4, 0.8], [area(large, 0.6), area(other, 0.9), area(large, 0.49)]),
        found_in([other], [0.5], [area(other, 0.5)]),
    ]
    monkeypatch.setattr(module.teacher.average, "forward", lambda images: found)
    pseudo = BoxBatch(list(noise(2, 0)), [{"clean": image} for image in noise(2, 1)], torch.arange(2))
    torch.manual_seed(1)
    loss = module.pseudo_loss(pseudo)
    targets = [
        {"boxes": torch.tensor([box]).float(), "labels": torch.ones(1).long(), "masks": area(box, 1.0).byte()[None]}
        for box in (large, other)
    ]
    torch.manual_seed(1)
    expected = module.learner.loss(BoxBatch(pseudo.images, targets, pseudo.index))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.teacher.share == pytest.approx(1.0)


@pytest.mark.parametrize("model", ["mask_rcnn_fpn", "mask_rcnn_c4"])
def test_where_no_mask_is_found_the_loss_is_a_zero_that_reaches_every_parameter(monkeypatch, model):
    module, box = masker(model), [2, 3, 40, 50]
    unsure = found_in([box], [0.1], [area(box, 1.0)])
    monkeypatch.setattr(module.teacher.average, "forward", lambda images: [{**unsure} for _ in images])
    pseudo = BoxBatch(list(noise(2, 0)), [{"clean": image} for image in noise(2, 1)], torch.arange(2))
    loss = module.pseudo_loss(pseudo)
    grads = gradients(module.learner, loss)
    assert loss.item() == 0
    assert grads.keys() == {name for name, p in module.learner.named_parameters() if p.requires_grad}
    assert not any(grad.any() for grad in grads.values())


# Pixels


def pixels(images: int = 4, seed: int = 0) -> MixedBatch:
    """Noise with maps of noise, and other noise that does not reach the lowest rows."""
    human, clean, distorted = (noise(images, 3 * seed + k) for k in range(3))
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(3, (images, 64, 64), generator=generator, dtype=torch.uint8)
    outside = torch.zeros(64, 64, dtype=torch.bool)
    outside[60:] = True
    index = torch.arange(images)
    return MixedBatch(
        BoxBatch(list(human), [{"class_map": each} for each in maps], index),
        BoxBatch(list(distorted), [{"clean": image, "outside": outside} for image in clean], index),
    )


def test_sure_pixels_of_the_clean_view_teach_the_distorted_one():
    module, batch = segmenter(threshold=0.4), pixels().pseudo
    loss = module.pseudo_loss(batch)
    clean, outside = (torch.stack([target[name] for target in batch.targets]) for name in ("clean", "outside"))
    with torch.no_grad():
        said = module.learner.segmenter.eval()(unit_range(clean)).double().softmax(1)  # the teacher is still its equal
    sure = (said.amax(1) >= 0.4) & ~outside
    assert 0.1 < sure.double().mean() < 0.9
    scores = module.learner.segmenter.train()(unit_range(torch.stack(batch.images)))
    expected = F.cross_entropy(scores.double(), said.argmax(1), reduction="none")[sure].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.teacher.share == pytest.approx((sure.sum() / (~outside).sum()).item(), rel=1e-5)


def test_pixels_outside_and_unsure_ones_carry_no_gradient():
    module, batch = segmenter(threshold=1.0), pixels().pseudo
    loss = module.pseudo_loss(batch)
    grads = gradients(module.learner, loss)
    assert loss.item() == 0
    assert grads.keys() == gradients(module.learner, module.learner.loss(pixels().human)).keys()
    assert not any(grad.any() for grad in grads.values())
    maps = segmenter().drawn_of(torch.stack(batch.images), batch.targets[0]["outside"].expand(4, -1, -1))
    assert (maps[:, 60:] == IGNORE).all()
    assert (maps[:, :60] != IGNORE).all()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """12 training and 3 held-out pictures."""
    root = tmp_path_factory.mktemp("coco")
    return write_coco(root, rectangles(root, "train", 12, 0), rectangles(root, "val", 3, 1))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_both_views_of_a_square_are_a_function_of_seed_epoch_and_row_and_say_where_the_image_ends(root, strength):
    train, _ = load_boxes("coco", root, masks=True)
    example, padded, differing = map_twin_example(train, strength, 64, seed=5), 0, 0
    geometry = {"s2": "s1", "s4": "s3"}.get(strength, strength)
    for row in range(12):
        (distorted, target), (again, _) = example(row, 1), map_twin_example(train, strength, 64, seed=5)(row, 1)
        assert torch.equal(distorted, again)
        assert distorted.shape == target["clean"].shape == (3, 64, 64)
        if STRENGTHS[geometry].policy is None:  # the same draws without a policy
            blank = {"boxes": torch.zeros(0, 4), "class_map": torch.zeros(train.sizes[row].tolist(), dtype=torch.uint8)}
            clean, known = augmented(train.picture(row), blank, geometry, 64, key(5, 1, row))
            assert torch.equal(target["clean"], clean)
            assert torch.equal(target["outside"], known["class_map"] == IGNORE)
        padded += bool(target["outside"].any())
        differing += not torch.equal(distorted, target["clean"])
        assert (
            target["clean"][:, target["outside"]] == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None]
        ).all()
    assert 0 < padded < 12 or strength == "own_scale"
    assert (differing > 0) == (STRENGTHS[strength].policy is not None)


# Images


def classified(images: int = 4, seed: int = 0) -> MixedBatch:
    human, clean, view = ((noise(images, 3 * seed + k, 32) / 255 - 0.5) * 4 for k in range(3))
    generator = torch.Generator().manual_seed(seed)
    labels, index = torch.randint(3, (images,), generator=generator), torch.arange(images)
    return MixedBatch(Batch([human], index, labels), Batch([clean, view], index, torch.full((images,), -1)))


@pytest.mark.parametrize("soft", [True, False])
def test_sure_images_teach_their_class_or_its_probabilities(soft):
    batch = classified(16).pseudo
    said = classifier().learner.eval()(batch.views[0]).detach().double().softmax(1)
    least = said.amax(1).median().item() + 1e-4  # half of them are sure
    module = classifier(soft, threshold=least)
    loss = module.pseudo_loss(batch)
    sure = said.amax(1) >= least
    assert 4 <= sure.sum() <= 12
    told = said if soft else F.one_hot(said.argmax(1), 3).double()
    scores = module.learner(batch.views[1]).double().log_softmax(1)
    expected = -(told * scores).sum(1)[sure].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.teacher.share == pytest.approx(sure.double().mean().item(), rel=1e-5)


def test_where_no_image_is_sure_the_loss_is_a_zero_that_reaches_every_parameter():
    module = classifier(threshold=1.0)
    loss = module.pseudo_loss(classified().pseudo)
    grads = gradients(module.learner, loss)
    assert loss.item() == 0
    assert grads.keys() == {name for name, p in module.learner.named_parameters() if p.requires_grad}
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize(
    ("what", "dtype"), [("pixels", torch.float64), ("images", torch.float64), ("images", torch.bfloat16)]
)
def test_networks_of_another_precision_are_taught_too(what, dtype):
    build_student, batch_of, _ = STUDENTS[what]
    module, batch = build_student().to(dtype), batch_of(2)
    if what == "images":
        batch = MixedBatch(*(part._replace(views=[view.to(dtype) for view in part.views]) for part in batch))
    module.loss(batch).backward()
    assert module.teacher.found.dtype == dtype
    assert module.teacher.share == pytest.approx(1, rel=0.02)


def test_a_moving_teacher_is_as_sure_as_labels_must_be_unless_it_is_said():
    words = ["task=selftrain", "threshold=0.8"]
    assert teacher_of(composed(words)) is None
    assert teacher_of(composed([*words, "teacher={decay: 0.9}"])) == {"threshold": 0.8, "decay": 0.9}
    assert teacher_of(composed([*words, "teacher={threshold: 0.7}"])) == {"threshold": 0.7}


# Ranks

STUDENTS = {"pixels": (segmenter, pixels, 0.4), "images": (classifier, classified, 0.6)}  # sure of some of them


def rows_of(part, rows: slice):
    """Some images of a batch, with all that belongs to them."""
    if isinstance(part, Batch):
        return Batch([view[rows] for view in part.views], part.index[rows], part.label[rows])
    return BoxBatch(part.images[rows], part.targets[rows], part.index[rows])


def taught_on_rank(rank: int, what: str, moving: dict, batches: list[MixedBatch]) -> dict[str, Tensor]:
    rows = slice(2 * rank, 2 * rank + 2)
    return taught_steps(
        STUDENTS[what][0](**moving), [MixedBatch(*(rows_of(part, rows) for part in b)) for b in batches]
    )


@pytest.mark.parametrize("what", STUDENTS)
def test_two_ranks_equal_one_though_they_are_sure_of_unlike_numbers(what):
    build_student, batch_of, threshold = STUDENTS[what]
    batches = [batch_of(4, seed) for seed in range(3)]
    if what == "pixels":  # on the second rank nothing but one row of pixels can be sure of anything
        for target in batches[-1].pseudo.targets[2:]:
            target["outside"] = torch.arange(64)[:, None].expand(64, 64) > 0
    moving = {"decay": 0.5, "burn_in": 0.1, "threshold": threshold}
    alone = taught_steps(build_student(**moving), batches)
    ranks = on_ranks(2, taught_on_rank, what, moving, batches)
    for name, value in alone.items():
        one, other = (found[name] for found in ranks)
        assert torch.equal(one, other), name
        if name == "teacher.found":  # means of a rank, and of the whole
            one = 2 * one
        torch.testing.assert_close(one, value, rtol=1e-4, atol=1e-6, msg=name)
    start = build_student(**moving).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in alone.items() if name.startswith("teacher.av"))
    assert 0 < alone["teacher.found"][0] < alone["teacher.found"][1]


# Whole runs

TEACHER = "teacher={decay: 0.5, burn_in: 0.4, threshold: 0.2}"
SMALL = ["label_fraction=0.5", "steps=5", "growth=0.0", "looks=1", "data.batch_size=4", "data.workers=1",
         "encoder.width=0.125", "trainer.accelerator=cpu", "trainer.precision=32-true", "monitor.log_every=1",
         "checkpoint.steps=1", TEACHER]  # fmt: skip


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return archive(tmp_path_factory.mktemp("noise") / "noise.npz", count=24)


def selftraining(what: str, root, noisy) -> list[str]:
    words = ["task=selftrain", *SMALL]
    if what == "images":
        return [*words, "data=npz", f"data.root={noisy}", "image_size=16", "threshold=0.99"]
    coco = [*words, "data=coco", f"data.root={root}", "data.class_agnostic=false"]
    if what == "pixels":
        return [*coco, "task.model=fpn", "threshold=0.99", "teacher_scales=[1.0]", "encoder.stem=imagenet",
                "task.size=48", "task.channels=8", "augment=s2"]  # fmt: skip
    return [*coco, "task.model=mask_rcnn_fpn", "threshold=0.99", "task.min_size=64", "task.max_size=64",
            "task.channels=16", "task.convs=1", "task.norm=none", "task.rois=8", "task.proposals=10",
            "task.score=0.0", "task.detections=30", "teacher={decay: 0.5, burn_in: 0.4, threshold: 0.0}"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("what", "named"), [("masks", "boxes"), ("pixels", "pixels"), ("images", "images")])
def test_self_training_by_a_moving_teacher_is_resumed_to_the_bit_and_needs_no_sure_fixed_one(
    tmp_path, root, noisy, what, named
):
    words = selftraining(what, root, noisy)
    summary = run([*words, f"run_dir={tmp_path / 'whole'}"])
    with killed_before(3, tmp_path / "broken" / "student"):
        run([*words, f"run_dir={tmp_path / 'broken'}"])
    resumed = run([f"resume={tmp_path / 'broken'}"])
    states = [checkpoint_of(tmp_path / name / "student")["state_dict"] for name in ("whole", "broken")]
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    assert states[0]["balance.means"].gt(0).all()
    for part in ("supervised", "student", "control"):
        for name in ("start", "teacher", "images_seen"):
            assert summary[part].get(name) == resumed[part].get(name)
        assert (summary[part]["teacher"] is None) == (part != "student")
    told = summary["student"]["teacher"]
    assert told.keys() == {"decay", "burn_in", "threshold", f"pseudo_{named}"}
    assert told[f"pseudo_{named}"] > 0
    assert summary["student"]["images_seen"] == 5 * 8 - 2 * 4  # two steps are burn-in
    rows = read_rows(tmp_path / "whole" / "student" / "metrics.csv")
    assert told[f"pseudo_{named}"] == [row for row in rows if f"pseudo_{named}" in row][-1][f"pseudo_{named}"]
    learner = trained_weights(tmp_path / "whole" / "student")
    assert learner
    assert all(torch.equal(value, states[0][f"learner.{name}"]) for name, value in learner.items())
    pseudo = summary["pseudo"]  # of the moving teacher, not of the fixed one that was sure of nothing
    assert pseudo == resumed["pseudo"] == summary_of(tmp_path / "whole" / "pseudo_moving")
    assert pseudo["threshold"] == told["threshold"] != summary_of(tmp_path / "whole" / "pseudo")["threshold"] == 0.99
    assert pseudo["judged_images"] > 0
    assert pseudo[{"boxes": "boxes", "pixels": "labelled_pixels", "images": "share"}[named]] > 0


def test_the_moving_teachers_labels_are_those_of_its_own_weights(tmp_path, root, noisy):
    words = [word for word in selftraining("images", root, noisy) if not word.startswith(("steps", "teacher"))]
    run([*words, "steps=4", "teacher={decay: 0.9, burn_in: 0.25, threshold: 0.2}", f"run_dir={tmp_path / 'run'}"])
    state = checkpoint_of(tmp_path / "run" / "student")["state_dict"]
    found = averaged_weights(tmp_path / "run" / "student")
    assert [len(part) > 0 for part in found] == [True, False, True]
    assert torch.equal(found[2]["weight"], state["teacher.average.copies.2.weight"])
    assert not torch.equal(found[2]["weight"], state["learner.classifier.weight"])
    network = load_tuned(tmp_path / "run" / "student")
    network.encoder.load_state_dict(found[0])
    network.classifier.load_state_dict(found[2])
    with np.load(tmp_path / "run" / "pseudo_moving" / "labels.npz") as told, np.load(noisy) as images:
        rows, probabilities = told["rows"], told["probabilities"]
        pixels = torch.from_numpy(images["train_images"][rows]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(network.encoder.metadata[key])[:, None, None] for key in ("mean", "std"))
    expected = network((pixels - mean) / std).softmax(1).detach().numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)


def test_a_moving_teacher_of_pixels_is_given_all_images_to_label(tmp_path, root, noisy):
    run([*selftraining("pixels", root, noisy), "steps=1", f"run_dir={tmp_path / 'run'}"])
    train, _ = load_boxes("coco", root, masks=True)
    assert len(PseudoMaps.read(tmp_path / "run" / "pseudo" / "maps", train.unlabelled())) == 6


# Mistakes


@pytest.mark.parametrize(
    ("what", "more", "message"),
    [
        ("pixels", "teacher={decay: 1.0}", "a moving teacher's decay=1.0 is no number from 0 to below 1"),
        ("pixels", "teacher={momentum: 0.9}", "is neither null nor settings of a moving teacher, decay, burn_in, thr"),
        ("images", "iterations=2", "the second student would be the first again; set iterations=1"),
        ("pixels", "task.teacher={decay: 0.9}", "type teacher= instead"),
        ("images", "teacher={threshold: 2}", "a moving teacher's threshold=2 is no score from 0 to 1"),
        ("images", "teacher=true", "teacher=True is neither null nor settings of a moving teacher"),
        ("images", "per_class=3", "per_class=3 balances the labels of a fixed teacher"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_written(tmp_path, root, noisy, capsys, what, more, message):
    words = [word for word in selftraining(what, root, noisy) if word.split("=")[0] != more.split("=")[0]]
    assert main([*words, more, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["task=segment", "data=coco", "data.root={root}"], ["task=finetune", "data=npz",
                                                                                     "data.root={noisy}"]])  # fmt: skip
def test_a_moving_teacher_without_images_is_refused(tmp_path, root, noisy, capsys, words):
    words = [word.format(root=root, noisy=noisy) for word in words]
    assert main([*words, "backbone=random", "task.teacher={decay: 0.9}", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "has nothing to label; set task.pseudo, which names images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
