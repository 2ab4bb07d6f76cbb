"""Fine-tuning: what is trained at which rate, on which labels, what it leaves, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from conftest import Tiny, on_ranks
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from runs import Flaky, Killed, checkpoint_of, image_set, images, killed_before, trainer
from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder, LabEncoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.checkpoints.backbone import load_backbone, load_projector, save_backbone
from sslzoo.checkpoints.classifier import load_tuned
from sslzoo.config import composed
from sslzoo.data.subsets import as_list, labelled, listed, part
from sslzoo.downstream.base import Evaluate, accuracies, answers
from sslzoo.downstream.finetune import Finetune
from sslzoo.errors import UserError
from sslzoo.methods import SimCLR
from sslzoo.monitor import Metrics
from sslzoo.optim import Optim
from sslzoo.report.csv_log import read_rows
from sslzoo.tasks.runs import images as images_of
from sslzoo.views import Clean, View, Views

SMALL = [
    "task=finetune",
    "data.train_size=160",
    "data.val_size=40",
    "data.batch_size=32",
    "data.workers=1",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "monitor.log_every=1",
]
SEEN = {"method": "simclr", "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 16, "config_hash": "0" * 12}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A SimCLR run's file, with the projector's first layer."""
    torch.manual_seed(0)
    method = SimCLR(Encoder("resnet10t", stem="small", width=0.125), dim=8, layers=3)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    return save_backbone(method.backbone, path, **SEEN, projector=method.kept_projector)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, backbone):
    run_dir = tmp_path_factory.mktemp("runs") / "finetune"
    return run_dir, run([*SMALL, f"backbone={backbone}", "data.label_fraction=0.5", f"run_dir={run_dir}"])


def complaint(capsys, *arguments):
    """The one line a mistake is told in."""
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sslzoo: ")
    return line


# ---- the method ----


def test_loss_is_the_cross_entropy_of_the_labels():
    module, (batch,) = make(), random_batches(1, 8, [(12,)])
    label = torch.arange(8) % 4
    scores = module.eval()(batch.views[0]).detach()
    expected = -sum(math.log(float(s.exp()[y] / s.exp().sum())) for s, y in zip(scores, label, strict=True)) / 8
    assert module.loss(batch._replace(label=label)).item() == pytest.approx(expected)


def test_loss_of_soft_labels_is_the_cross_entropy_to_the_whole_distribution():
    module, (batch,) = make(), random_batches(1, 8, [(12,)])
    label = torch.rand(8, 4, generator=torch.Generator().manual_seed(3))
    label = label / label.sum(1, keepdim=True)  # float32, as it is stored
    scores = module.eval()(batch.views[0]).detach()
    expected = 0.0
    for s, p in zip(scores.tolist(), label.tolist(), strict=True):
        total = math.log(sum(math.exp(each) for each in s))
        expected -= sum(share * (each - total) for each, share in zip(s, p, strict=True)) / 8
    assert module.loss(batch._replace(label=label)).item() == pytest.approx(expected, rel=1e-9)
    hard = torch.eye(4)[label.argmax(1)]  # of one class for sure: the loss of that class
    of_class = module.loss(batch._replace(label=label.argmax(1)))
    assert module.loss(batch._replace(label=hard)).item() == pytest.approx(of_class.item(), rel=1e-9)


def make() -> Finetune:
    optim = Optim(lr=0.1, lr_per=None, weight_decay=1e-3)
    return sync_batchnorm(Finetune(Tiny(), 4, optim, layer_decay=1.0, head_lr_scale=3.0).double())


def test_two_ranks_learn_what_one_does():
    batches = [b._replace(label=torch.randint(4, (8,))) for b in random_batches(4, 8, [(12,)])]
    alone = train_alone(make, batches)
    for rank in train_on_ranks(2, make, batches):
        assert_same(alone, rank)


def scales(module: Finetune) -> dict[str, float]:
    found = {id(p): group["lr_scale"] for group in module.parameter_groups() for p in group["params"]}
    return {name: found[id(p)] for name, p in module.named_parameters()}


def test_each_block_of_a_vit_has_the_rate_of_the_next_times_the_decay():
    encoder = Encoder("vit_tiny_patch16_224", options={"img_size": 16, "patch_size": 8, "depth": 3})
    of = scales(Finetune(encoder, 4, head_lr_scale=2.0))  # 0.75 where nothing is said
    assert of["encoder.net.patch_embed.proj.weight"] == of["encoder.net.pos_embed"] == pytest.approx(0.75**4)
    for block in range(3):
        assert of[f"encoder.net.blocks.{block}.attn.qkv.weight"] == pytest.approx(0.75 ** (3 - block))
    assert of["classifier.weight"] == of["classifier.bias"] == 2.0


def test_layers_of_a_resnet_are_its_stages_and_without_a_decay_there_is_one_rate():
    encoder = Encoder("resnet18", stem="small", width=0.125)
    of = scales(Finetune(encoder, 4, layer_decay=0.5))
    assert of["encoder.net.conv1.weight"] == of["encoder.net.bn1.weight"] == 0.5**5
    for stage in (1, 2, 3, 4):
        assert {of[f"encoder.net.layer{stage}.{block}.conv1.weight"] for block in (0, 1)} == {0.5 ** (5 - stage)}
    assert set(scales(Finetune(encoder, 4)).values()) == {1.0}


def test_rates_and_decay_reach_the_optimizer_every_step():
    module = Finetune(Tiny(), 4, Optim(lr=0.1, lr_per=None, exclude="bias_and_norm"), layer_decay=1.0, head_lr_scale=5)
    optimizer = module.configure_optimizers()
    module.optim.set(optimizer, 50, 100, 10)
    found = {(group["lr_scale"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    halved = module.optim.lr_at(50, 100, 10)
    assert found == {(5, 5 * halved, 1e-4), (5, 5 * halved, 0.0), (1.0, halved, 1e-4), (1.0, halved, 0.0)}


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_a_layer_decay_that_is_no_share_is_refused(decay):
    with pytest.raises(UserError, match=f"task.layer_decay={decay}"):
        Finetune(Tiny(), 4, layer_decay=decay)


def test_layers_of_two_networks_side_by_side_have_no_order():
    encoder = LabEncoder("resnet10t", stem="small", width=0.25)
    assert set(scales(Finetune(encoder, 4)).values()) == {1.0}
    with pytest.raises(UserError, match=r"task.layer_decay=0.5 needs .* LabEncoder has two .* set task.layer_decay=1"):
        Finetune(encoder, 4, layer_decay=0.5).parameter_groups()


# ---- scoring ----


class Fixed(nn.Module):
    """Scores by the mean of each channel, red, green and blue first of seven classes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(7)[:3] - torch.arange(7.0) / 100)  # no ties

    def forward(self, x):
        return x.mean((2, 3)) @ self.weight


def test_top1_and_top5_are_those_of_a_loop():
    val = image_set(20)
    val.labels[:] = np.random.default_rng(0).integers(0, 7, 20)
    val.labels[3] = -1
    found = accuracies(answers(Fixed(), val, Clean(8)), "x")
    right = five = 0
    for i in [i for i in range(20) if i != 3]:
        scores = Fixed()(Clean(8)(val.images[i : i + 1], np.array([i]), 0))[0].tolist()
        order = sorted(range(7), key=lambda c, s=scores: -s[c])
        right += order[0] == val.labels[i]
        five += val.labels[i] in order[:5]
    assert found == {"x_top1": pytest.approx(right / 19), "x_top5": pytest.approx(five / 19)}


def test_images_that_cannot_be_read_are_not_counted():
    val = Flaky(image_set(12), broken=[0, 4])
    found = answers(Fixed(), val, Clean(8), on_error="skip")
    assert found[2].tolist() == [float(i not in (0, 4)) for i in range(12)]
    assert accuracies(found, "x")["x_top1"] == 1


def answers_on_rank(rank):
    return answers(Fixed(), image_set(13), Clean(8))


def test_ranks_share_the_held_out_images_and_all_know_the_score():
    alone = answers_on_rank(0)
    for found in on_ranks(2, answers_on_rank):
        assert torch.equal(found, alone)


class Flat(nn.Sequential):
    """A linear encoder with what a timm one has."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 8))
        self.dim = 8


def one_view():
    data = images(batch_size=8)
    data.views = Views([View(8)])
    return data


def test_it_learns_what_the_labels_say():
    data = one_view()
    module = Finetune(Flat(), 3, Optim(lr=0.05, lr_per=None), layer_decay=1.0)
    evaluate = Evaluate(data.val, data.clean, "finetune")
    trainer(evaluate, max_epochs=6).fit(module, datamodule=data)
    assert evaluate.values["finetune_top1"] == 1


def test_a_run_that_turns_nan_names_the_tasks_own_rate():
    module = Finetune(Flat(), 3, Optim(lr=1e30, lr_per=None), layer_decay=1.0)
    with pytest.raises(UserError, match=r"try task\.optim\.lr="):
        trainer(Metrics(1), max_epochs=20).fit(module, datamodule=one_view())


# ---- the projector that a run keeps ----


def test_a_simclr_run_keeps_the_first_layer_of_its_projector():
    torch.manual_seed(0)
    method = SimCLR(Encoder("resnet10t", stem="small", width=0.125), dim=8, layers=3).eval()
    x = torch.randn(2, 3, 16, 16)
    module = Finetune(method.encoder, 5, projector=method.kept_projector).eval()
    expected = module.classifier(method.up_to_layer(1)(x))
    assert torch.equal(module(x), expected)
    assert SimCLR(method.encoder, layers=1).kept_projector is None


def test_the_kept_layer_comes_back_from_the_file_and_the_backbone_without_it(backbone, tmp_path):
    projector = load_projector(backbone)
    encoder = load_backbone(backbone)
    assert [type(layer).__name__ for layer in projector] == ["Linear", "BatchNorm1d", "ReLU"]
    assert projector[0].in_features == encoder.dim
    with safe_open(backbone, framework="pt") as file:
        assert torch.equal(projector[0].weight, file.get_tensor("projector/0.weight"))
        assert torch.equal(projector[1].running_var, file.get_tensor("projector/1.running_var"))
    alone = save_backbone(encoder, tmp_path / "alone.safetensors", **SEEN)
    assert load_projector(alone) is None
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_backbone(alone)(x), encoder(x))


def test_pretraining_by_simclr_v2_leaves_it(tmp_path):
    small = ["data.train_size=32", "data.val_size=10", "data.batch_size=16", "data.workers=1", "encoder.width=0.125"]
    here = ["image_size=16", "trainer.max_epochs=1", "trainer.accelerator=cpu", f"run_dir={tmp_path / 'run'}"]
    run(["method=simclr_v2", *small, *here])
    state, kept = checkpoint_of(tmp_path / "run")["state_dict"], load_projector(tmp_path / "run/backbone.safetensors")
    for name, value in kept.state_dict().items():
        assert torch.equal(value, state[f"projector.{name}"]), name


def test_tuning_from_the_projector_changes_and_leaves_it(backbone, tmp_path):
    run([*SMALL, f"backbone={backbone}", "task.from=projector", "trainer.max_epochs=1", f"run_dir={tmp_path / 'run'}"])
    before, after = load_projector(backbone), load_projector(tmp_path / "run" / "backbone.safetensors")
    assert not torch.equal(before[0].weight, after[0].weight)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert score_of(tmp_path / "run") == pytest.approx(summary["finetune_top1"])


# ---- a run ----


def score_of(run_dir, *more):
    tuned = load_tuned(run_dir)
    config = composed([*SMALL, *more])
    config.image_size, config.data.mean, config.data.std = SEEN["image_size"], SEEN["mean"], SEEN["std"]
    data = images_of(config)
    return accuracies(answers(tuned, data.val, data.clean), "x")["x_top1"]


def test_a_run_leaves_its_score_its_labels_and_a_network_that_has_that_score(finished, backbone):
    run_dir, summary = finished
    assert json.loads((run_dir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["task"], summary["method"], summary["data"]) == ("finetune", "simclr", "photos")
    assert (summary["label_fraction"], summary["labelled_images"], summary["epochs"]) == (0.5, 80, 2)
    assert summary["lr"] == pytest.approx(0.05 * 32 / 256)
    assert summary["finetune_top1"] <= summary["finetune_top5"] <= 1
    assert score_of(run_dir) == pytest.approx(summary["finetune_top1"])
    last = [row for row in read_rows(run_dir / "metrics.csv") if "finetune_top1" in row]
    assert [row["epoch"] for row in last] == [0, 1]
    assert last[-1]["finetune_top1"] == summary["finetune_top1"]
    before, after = load_backbone(backbone), load_backbone(run_dir / "backbone.safetensors")
    assert not torch.equal(before.net.conv1.weight, after.net.conv1.weight)
    assert after.metadata["method"] == "simclr+finetune"
    assert not torch.equal(before.net.bn1.running_mean, after.net.bn1.running_mean)  # trained, not frozen


def test_labels_used_are_written_as_a_list_that_gives_the_same_run(finished, backbone, tmp_path):
    run_dir, _ = finished
    rows = (run_dir / "labelled.txt").read_text().split()
    assert len(rows) == len(set(rows)) == 80
    again = tmp_path / "again"
    run([*SMALL, f"backbone={backbone}", f"data.label_list={run_dir / 'labelled.txt'}", f"run_dir={again}"])
    one, other = checkpoint_of(run_dir)["state_dict"], checkpoint_of(again)["state_dict"]
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (again / "labelled.txt").read_text() == (run_dir / "labelled.txt").read_text()


OPTIONS = ["task.optim.name=adamw", "task.optim.lr=0.01", "task.layer_decay=0.8", "task.from=projector"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, backbone):
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    run([*SMALL, *OPTIONS, f"backbone={backbone}", f"run_dir={run_dir}"])
    return run_dir


@pytest.mark.parametrize(("killed_after", "checkpoint_every"), [(3, 2), (5, 100), (8, 4), (10, 100)])
def test_killed_and_resumed_equals_unbroken(tmp_path, monkeypatch, unbroken, backbone, killed_after, checkpoint_every):
    run_dir = tmp_path / "broken"

    def die_at_the_end(*_, **__):
        raise Killed

    arguments = [*SMALL, *OPTIONS, f"backbone={backbone}", f"checkpoint.steps={checkpoint_every}"]
    with monkeypatch.context() as patch, killed_before(killed_after):
        if killed_after == 10:  # after the last checkpoint, before the summary
            patch.setattr("sslzoo.tasks.finetune.save_backbone", die_at_the_end)
        run([*arguments, f"run_dir={run_dir}"])
    assert not (run_dir / "summary.json").exists()
    run([f"resume={run_dir}"])
    one, other = checkpoint_of(unbroken), checkpoint_of(run_dir)
    assert one["global_step"] == other["global_step"] == 10
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    rows = [[row for row in read_rows(d / "metrics.csv") if "finetune_top1" in row] for d in (unbroken, run_dir)]
    assert rows[0] == rows[1]
    finals = [json.loads((d / "summary.json").read_text()) for d in (unbroken, run_dir)]
    for key in ("loss", "finetune_top1", "finetune_top5", "steps", "epochs", "config_hash", "labelled_images"):
        assert finals[0][key] == finals[1][key], key


def test_fewer_labelled_images_than_a_batch_make_a_smaller_one(backbone, tmp_path):
    some = ["data.label_fraction=0.125", "trainer.max_epochs=1", f"run_dir={tmp_path / 'run'}"]
    summary = run([*SMALL, f"backbone={backbone}", *some])
    assert (summary["labelled_images"], summary["batch_size"], summary["steps"]) == (20, 16, 1)
    assert summary["lr"] == pytest.approx(0.05 * 16 / 256)


# ---- lists of labelled images ----


def tree(root, **counts):
    """``train/CLASS/CLASS_N.png`` and one held-out image a class; ``size=`` varies so that files stay on disk."""
    for i, (name, count) in enumerate(counts.items()):
        for split, number in (("train", count), ("val", 1)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(number):
                Image.new("RGB", (16, 16), (60 * i, 9 * n, 100)).save(folder / f"{name}_{n}.png")
    return root


@pytest.mark.parametrize("memory", [0, 2048])
def test_a_published_list_of_file_names_finds_its_rows(tmp_path, memory):
    tree(tmp_path, n01=4, n02=3)
    train = images_of(composed(["data=folder", f"data.root={tmp_path}", f"data.memory_limit_mb={memory}"])).train
    chosen = tmp_path / "2percent.txt"
    chosen.write_text("n02_1.png\nn01_3.png\n\nn01/n01_0.png\n")
    rows = listed(train, chosen)
    assert [train.files[row].name for row in rows] == ["n01_0.png", "n01_3.png", "n02_1.png"]
    chosen.write_text(as_list(train, rows))
    assert np.array_equal(listed(train, chosen), rows)
    some = part(train, rows)
    assert [file.name for file in some.files] == ["n01_0.png", "n01_3.png", "n02_1.png"]
    assert some.labels.tolist() == [0, 0, 1]
    assert np.array_equal(some.read(2), train.read(int(rows[2])))


def test_a_name_that_two_classes_have_needs_its_class(tmp_path):
    tree(tmp_path, cat=1, dog=1)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name / f"{name}_0.png").rename(tmp_path / "train" / name / "1.png")
    train = images_of(composed(["data=folder", f"data.root={tmp_path}"])).train
    chosen = tmp_path / "list.txt"
    chosen.write_text("dog/1.png")
    assert listed(train, chosen).tolist() == [1]
    chosen.write_text("1.png")
    with pytest.raises(UserError, match=r"names 1.png, of which there are several"):
        listed(train, chosen)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is no file"),
        ("3\n900\n77x\n", r"names 900, which is not in the 24 images of noise \(2 such lines\)"),
        ("\n", "names no image"),
        (b"\xff\xfe\x00", "is no text file"),
    ],
)
def test_a_list_that_does_not_fit_the_set_is_refused(tmp_path, content, told):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told):
        labelled(image_set(24), label_list=path)


def test_a_list_and_a_fraction_are_one_too_many(tmp_path):
    with pytest.raises(UserError, match="both choose images"):
        labelled(image_set(24), 0.5, tmp_path / "list.txt")


def test_a_list_of_images_without_labels_is_refused(tmp_path):
    train = image_set(24)
    train.labels[2] = -1
    (tmp_path / "list.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match="have no label"):
        labelled(train, label_list=tmp_path / "list.txt")


# ---- mistakes ----


def npz(path, train, val):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, labels in (("train", train), ("val", val)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (len(labels), 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array(labels)
    np.savez(path, **arrays)
    return ["task=finetune", "data=npz", f"data.root={path}", "data.batch_size=2", "data.workers=1"]


def test_labels_of_one_class_only_are_refused(capsys, tmp_path, backbone):
    data = npz(tmp_path / "one.npz", [0] * 4, [0] * 2)
    assert "needs two classes or more" in complaint(capsys, *data, f"backbone={backbone}")


def test_a_held_out_class_without_a_labelled_training_image_is_refused(capsys, tmp_path, backbone):
    data = npz(tmp_path / "two.npz", [0, 1, 2] * 2, [0, 1, 2])
    (tmp_path / "list.txt").write_text("0\n1\n3\n")
    line = complaint(capsys, *data, f"backbone={backbone}", f"data.label_list={tmp_path / 'list.txt'}")
    assert "has 1 class among its held-out images that no training image shows (2)" in line


def test_images_without_labels_are_refused(capsys, tmp_path, backbone):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    line = complaint(capsys, "task=finetune", "data=folder", f"data.root={tmp_path}", f"backbone={backbone}")
    assert "folder has no labels to learn from" in line


def test_no_held_out_images_are_refused(capsys, tmp_path, backbone):
    tree(tmp_path, cat=2, dog=2)
    (tmp_path / "val").rename(tmp_path / ".elsewhere")
    line = complaint(capsys, "task=finetune", "data=folder", f"data.root={tmp_path}", f"backbone={backbone}")
    assert "has no held-out labels" in line


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.label_fraction=0.01", "leaves class 0 with its 16 images empty; set it to at least 0.062"),
        ("data.label_fraction=2", "data.label_fraction=2 is no fraction"),
        ("data.label_list=nowhere.txt", "data.label_list=nowhere.txt is no file"),
        ("task.from=head", "task.from=head is neither backbone nor projector"),
        ("task.layer_decay=2", "task.layer_decay=2 is no share"),
        ("task.optim.name=adagrad", "optim.name=adagrad is none of"),
        ("optim.lr=0.1", "optim.lr=0.1 is pretraining's; for task=finetune type task.optim.lr=0.1"),
        ("views=simclr", "views=simclr is pretraining's"),
        ("task.views.full.count=2", "task.views gives 2 views of an image"),
    ],
)
def test_settings_that_do_not_work_are_refused_before_a_run_directory(capsys, tmp_path, backbone, override, told):
    run_dir = tmp_path / "run"
    extra = "+" if override == "task.views.full.count=2" else ""
    assert told in complaint(capsys, *SMALL, f"backbone={backbone}", extra + override, f"run_dir={run_dir}")
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "task=finetune needs backbone="),
        (["backbone=nowhere.safetensors"], "backbone=nowhere.safetensors is no file"),
        (["backbone=random", "task.from=projector"], "backbone=random keeps no projector"),
        (
            ["backbone=timm/vit_tiny_patch16_224", "pretrained=false"],
            "takes no images of image_size=32 pixels",
        ),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(capsys, arguments, told):
    assert told in complaint(capsys, *SMALL, *arguments)


def test_a_file_that_is_a_classifier_is_no_backbone(capsys, finished):
    path = finished[0] / "classifier.safetensors"
    assert "was not written by sslzoo: its metadata does not say" in complaint(capsys, *SMALL, f"backbone={path}")


def test_resume_as_another_tuning_is_refused(capsys, unbroken):
    line = complaint(capsys, f"resume={unbroken}", "task.optim.lr=1")
    assert "goes on with a run of finetune that has task.optim.lr=0.01" in line
