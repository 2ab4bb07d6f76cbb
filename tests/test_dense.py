"""What detection, segmentation and keypoints share: damaged held-out pictures, weights that nothing needs."""

import pytest
import torch
from torch import nn

import test_detection
import test_keypoints
import test_segment
from boxed import rectangles, write_coco
from pointed import write_corners
from sslzoo.__main__ import main, run
from sslzoo.errors import UserError
from sslzoo.tasks.dense import leave_out_unused

COMMANDS = {
    task.__name__.removeprefix("test_"): task.command for task in (test_detection, test_segment, test_keypoints)
}


def damaged(tmp_path, task: str):
    """A folder in COCO's layout whose first held-out picture is cut short, and that picture."""
    if task == "keypoints":
        root = write_corners(tmp_path, 8, 4)
    else:
        root = write_coco(tmp_path, rectangles(tmp_path, "train", 8, 0), rectangles(tmp_path, "val", 4, 1))
    file = root / "val2017" / "1000.png"
    file.write_bytes(file.read_bytes()[:-100])
    return root, file


@pytest.mark.parametrize("task", COMMANDS)
def test_a_damaged_held_out_picture_is_refused_before_anything_is_written(tmp_path, capsys, task):
    root, file = damaged(tmp_path, task)
    run_dir = tmp_path / "run"
    assert main(COMMANDS[task](root, "data.on_error=raise", f"run_dir={run_dir}")) == 2
    said = capsys.readouterr().err
    assert f"{file} cannot be decoded" in said
    assert said.count("\n") == 1
    assert not run_dir.exists()


@pytest.mark.parametrize("task", COMMANDS)
def test_a_damaged_held_out_picture_is_left_out_of_the_score_where_asked(tmp_path, capsys, task):
    root, file = damaged(tmp_path, task)
    more = ["data.on_error=skip", "trainer.max_epochs=1", f"run_dir={tmp_path / 'run'}"]
    summary = run(COMMANDS[task](root, *more))
    assert summary["skipped"] == {"unreadable held-out image": 1}
    # Of four pictures the last has no object, and each other has two
    wanted = ("val_objects", 4) if task == "keypoints" else ("val_images", 3)
    assert summary[wanted[0]] == wanted[1]
    assert capsys.readouterr().err.count(str(file)) == 1


class Halves(nn.Module):
    """Of whose two layers one is used."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.elsewhere = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        if x.shape[-1] != 8:
            raise ValueError(f"8 pixels expected, not {x.shape[-1]}.\nSecond line")
        return [self.used(x), self.used(x)[:, :1]]


def test_weights_that_nothing_needs_are_not_trained_and_no_gradient_is_left():
    net = Halves()
    leave_out_unused(net, net, 8, "runs/a", "task.size", net.elsewhere.parameters())
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"unused.weight", "unused.bias"}
    assert all(p.grad is None for p in net.parameters())
    leave_out_unused(net, net, 8, "runs/a", "task.size")  # of weights that are left out already
    assert not net.elsewhere.weight.requires_grad
    assert isinstance(net(torch.ones(1, 3, 8, 8)), list)


def test_an_encoder_that_cannot_see_such_images_is_refused_in_one_line():
    net = Halves()
    with pytest.raises(UserError) as raised:
        leave_out_unused(net, net, 9, "runs/a", "task.size")
    assert str(raised.value) == (
        "backbone=runs/a gives no maps of images of 9 pixels (8 pixels expected, not 9);"
        " take another backbone or task.size"
    )
