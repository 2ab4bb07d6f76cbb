"""Every method, broken off and resumed, ends with the weights, memories and optimizer of an unbroken run."""

import shutil

import pytest
import torch

from runs import archive, assert_same_run, checkpoint_of
from sslzoo.__main__ import run
from sslzoo.config import options
from sslzoo.monitor import Metrics
from sslzoo.tasks import pretrain

SMALL = [
    "data=npz",
    "data.batch_size=16",
    "data.workers=1",
    "encoder.width=0.0625",
    "image_size=16",
    "local_size=8",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "monitor.k=5",
    "monitor.doctor=false",  # so few steps teach little
    "checkpoint.steps=2",
]
STEPS = 8  # two epochs of four
MOCO = ["method.dim=8", "method.queue_size=40", "method.bn_groups=2"]
BANK = ["method.dim=8", "method.negatives=12", "views=single", "method.softmax=false"]
PATCHES = ["encoder.patch=8", "encoder.stride=4", "method.offsets=[1,2]", "method.dim=8", "method.hidden=8"]
HEADS = ["method.dim=8", "method.hidden=16"]
CROPS = ["views=mild_multicrop", "views.full.size=16", "views.local.count=2"]
SWAV = [*HEADS, *CROPS, "method.prototypes=12", "method.queue_size=32", "method.queue_start=1"]
DINO = [*CROPS, "method.hidden=16", "method.bottleneck=8", "method.out_dim=24", "method.freeze_last_layer=1"]
OF_METHOD = {
    "byol": HEADS,
    "cmc": [*BANK, "encoder.width=0.125"],
    "cpc": PATCHES,
    "cpc_v2": PATCHES,
    "dino": DINO,
    "instdisc": BANK,
    "invaspread": ["method.dim=8"],
    "moco": MOCO,
    "moco_v2": MOCO,
    "moco_v3": HEADS,
    "simclr": ["method.dim=8"],
    "simclr_v2": ["method.dim=8", "method.queue_size=40"],
    "simsiam": ["method.dim=8", "method.bottleneck=4"],
    "swav": SWAV,
}
VIT = [
    "encoder=vit_tiny",
    "encoder.width=1",
    "+encoder.options.num_heads=2",
    "encoder.options.depth=2",
    "+encoder.options.embed_dim=16",
]


@pytest.fixture
def run_and_leave(tmp_path, monkeypatch):
    """Runs once, and keeps for each step asked for what a kill at its beginning would leave on the disk."""
    for picture in ("curves", "neighbour_strips"):  # a second each
        monkeypatch.setattr(pretrain, picture, lambda *args: None)

    root = archive(tmp_path / "noise.npz")

    def work(steps, *overrides):
        begin = Metrics.on_train_batch_start

        def copy_first(self, trainer, *rest):
            if trainer.global_step in steps:
                shutil.copytree(tmp_path / "whole", tmp_path / f"killed_{trainer.global_step}")
            begin(self, trainer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Metrics, "on_train_batch_start", copy_first)
            run([*SMALL, f"data.root={root}", *overrides, f"run_dir={tmp_path / 'whole'}"])
        left = [tmp_path / f"killed_{step}" for step in steps]
        assert [checkpoint_of(d)["global_step"] for d in left] == [step - 1 for step in steps]  # one step is lost
        return tmp_path / "whole", *left

    return work


@pytest.mark.parametrize("method", options("method"))
def test_every_method_killed_and_resumed_equals_unbroken(run_and_leave, method):
    whole, killed = run_and_leave([3], f"method={method}", *OF_METHOD[method])
    run([f"resume={killed}"])
    assert_same_run(whole, killed, STEPS)


def test_swav_killed_while_its_queues_are_empty_filling_and_in_use_equals_unbroken(run_and_leave):
    whole, *left = run_and_leave([3, 5, 7], "method=swav", *SWAV, "method.queue_start=0.75", "method.queue_size=40")
    pointers = [int(checkpoint_of(d)["state_dict"]["queues.0.pointer"]) for d in (*left, whole)]
    assert pointers == [0, 16, 8, 0]  # 16 rows a step since step 3, around a queue of 40
    for killed in left:
        run([f"resume={killed}"])
        assert_same_run(whole, killed, STEPS)


def test_dino_of_a_vit_killed_while_its_last_layer_is_frozen_equals_unbroken(run_and_leave):
    """Stochastic depth draws anew each step, and AdamW knows the last layer from the second epoch on."""
    dropped = ["encoder.options.drop_path_rate=0.5", "optim.weight_decay=0.04", "optim.final_weight_decay=0.4"]
    whole, early, late = run_and_leave([3, 7], "method=dino", *DINO, *VIT, *dropped)
    frozen, thawed, end = (checkpoint_of(d) for d in (early, late, whole))
    known = [len(state["optimizer_states"][0]["state"]) for state in (frozen, thawed)]
    assert known[1] == known[0] + 1
    last = [state["state_dict"]["projector.last_layer.weight_v"] for state in (frozen, thawed, end)]
    assert not torch.equal(last[0], last[1])
    for killed in (early, late):
        run([f"resume={killed}"])
        assert_same_run(whole, killed, STEPS)
