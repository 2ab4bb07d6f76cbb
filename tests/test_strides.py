"""Small maps before strided convolutions: found, and refused where bfloat16 would train on unset gradients."""

import pytest
import torch
from torch.nn import functional as F

from sslzoo.__main__ import main
from sslzoo.blocks import Encoder
from sslzoo.blocks.strides import one_pixel_strides

SMALL = ["encoder=resnet18", "encoder.width=0.125", "encoder.stem=imagenet", "data.batch_size=16",
         "trainer.accelerator=cpu"]  # fmt: skip


@pytest.mark.parametrize(
    ("stem", "size", "found"),
    [("imagenet", 32, []), ("imagenet", 24, []), ("imagenet", 16, ["net.layer4.0.conv1"]), ("small", 16, [])],
)
def test_strided_convolutions_of_single_pixels_are_found_and_nothing_is_left_behind(stem, size, found):
    encoder = Encoder("resnet18", stem, width=0.125).eval()
    x = torch.zeros(1, 3, size, size)
    assert one_pixel_strides(encoder, lambda: encoder(x)) == found
    assert not any(part._forward_pre_hooks for part in encoder.modules())


def test_float32_has_the_right_gradient_of_single_pixels():
    torch.manual_seed(0)
    x, w = torch.randn(64, 16, 1, 1), torch.randn(32, 16, 3, 3, requires_grad=True)
    y = F.conv2d(x, w, stride=2, padding=1)
    g = torch.randn_like(y)
    y.backward(g)
    expected = torch.zeros_like(w)
    expected[:, :, 1, 1] = g[:, :, 0, 0].T @ x[:, :, 0, 0]  # the rest of the kernel sees padding
    torch.testing.assert_close(w.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("precision", "refused"), [("bf16-mixed", True), ("32-true", False)])
def test_views_too_small_for_bfloat16_on_a_cpu_are_refused_before_anything_is_written(
    tmp_path, capsys, precision, refused
):
    words = [
        "method=swav", "encoder=resnet18", "encoder.width=0.125", "image_size=32", "views.full.size=32",
        "local_size=16", "data.batch_size=16", "data.train_size=32", "data.val_size=16", "trainer.max_steps=1",
        "method.queue_size=0", "method.prototypes=8", "trainer.accelerator=cpu", f"trainer.precision={precision}",
    ]  # fmt: skip
    code = main([*words, f"run_dir={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert code == (2 if refused else 0), said
    assert ("views of 16 pixels reach layer4.0.conv1 of the encoder as single pixels" in said) == refused
    assert (tmp_path / "run").exists() != refused


@pytest.mark.parametrize("task", ["finetune", "distill", "detect"])
def test_tasks_that_train_a_backbone_refuse_such_images_too(tmp_path, capsys, tuned, task):
    words = {
        "finetune": ["task=finetune", "backbone=random", "image_size=16"],
        "distill": ["task=distill", f"task.teacher={tuned}"],
        "detect": ["task=detect", "backbone=random", "task.joint={data: photos, size: 16, batch_size: 8}"],
    }[task]
    run_dir = tmp_path / "run"
    assert main([*words, *SMALL, "trainer.precision=bf16-mixed", f"run_dir={run_dir}"]) == 2
    assert "of 16 pixels reach layer4.0.conv1 of the encoder as single pixels" in capsys.readouterr().err
    assert not run_dir.exists()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A network tuned on images of 16 pixels, in float32."""
    run_dir = tmp_path_factory.mktemp("runs") / "tuned"
    words = ["task=finetune", "backbone=random", "image_size=16", "trainer.max_steps=1", "trainer.precision=32-true"]
    assert main([*words, *SMALL, f"run_dir={run_dir}"]) == 0
    return run_dir
