"""InfoMin's views: the fused pass, then RandAugment, and all of it a pure function of seed, epoch and image."""

import random
import threading

import numpy as np
import pytest
import torch

from runs import archive
from sslzoo.__main__ import main, run
from sslzoo.config import composed
from sslzoo.errors import UserError
from sslzoo.tasks import pretrain
from sslzoo.tasks.pretrain import build_method
from sslzoo.tasks.runs import images
from sslzoo.views import Blur, Jitter, View, Views
from sslzoo.views.infomin import InfoMin

STACK = np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_views_of_an_image_depend_on_seed_epoch_image_and_view_alone():
    views = InfoMin(16, seed=3)
    first, second = views(STACK, range(6), 2)
    assert first.shape == second.shape == (6, 3, 16, 16)
    alone = InfoMin(16, seed=3)(STACK[4:5], [4], 2)
    assert torch.equal(alone[0][0], first[4])
    assert torch.equal(alone[1][0], second[4])
    others = [second, views(STACK, range(6), 3)[0], InfoMin(16, seed=4)(STACK, range(6), 2)[0]]
    assert not any(torch.equal(first[i], other[i]) for other in others for i in range(6))


def test_all_generators_are_left_as_they_were():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    InfoMin(16)(STACK, range(6), 0)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_training_step_that_draws_beside_it_changes_nothing():
    views, stop = InfoMin(16), threading.Event()
    expected = views(STACK, range(6), 0)

    def step():
        while not stop.is_set():
            torch.manual_seed(0)
            torch.rand(10)

    beside = threading.Thread(target=step)
    beside.start()
    try:
        found = [views(STACK, range(6), 0) for _ in range(5)]
    finally:
        stop.set()
        beside.join()
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))


def test_without_randaugment_and_gray_it_is_the_fused_pass_but_for_rounding_to_bytes():
    fused = Views([View(16, 2, (0.2, 1.0), jitter=Jitter(0.8, 0.8, 0.8, 0.2, 0.8), blur=Blur(0.5))], **PLAIN, seed=1)
    found = InfoMin(16, **PLAIN, seed=1, operations=0, gray=0.0)(STACK, range(6), 5)
    for one, other in zip(found, fused(STACK, range(6), 5), strict=True):
        torch.testing.assert_close(one, other, atol=0.501 / 255, rtol=0)


def test_randaugment_changes_images_and_a_fifth_is_gray():
    many = np.repeat(STACK[:1], 300, 0)
    settings = {**PLAIN, "count": 1, "strength": 0.0, "blur": 0.0}
    (without,) = InfoMin(12, **settings, operations=0, gray=0.0)(many, range(300), 0)
    (found,) = InfoMin(12, **settings, gray=0.0)(many, range(300), 0)
    changed = ((found - without).abs().amax((1, 2, 3)) > 1 / 255).float().mean()
    assert changed > 0.5  # two operations, each applied every other time; a few of them change little
    (grayed,) = InfoMin(12, **settings, operations=0)(many, range(300), 0)
    assert (grayed.amax(1) == grayed.amin(1)).all((1, 2)).float().mean() == pytest.approx(0.2, abs=0.07)


def test_normalised_as_asked():
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    settings = {"count": 1, "operations": 0, "seed": 1}
    (raw,) = InfoMin(16, **PLAIN, **settings)(STACK, range(6), 0)
    (found,) = InfoMin(16, mean, std, **settings)(STACK, range(6), 0)
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(found, expected)


def small(tmp_path):
    root = archive(tmp_path / "noise.npz")
    return ["views=infomin", "image_size=16", "data=npz", f"data.root={root}", "data.batch_size=16", "data.workers=1"]


def test_a_method_trains_on_it_and_is_the_same_again(tmp_path, monkeypatch):
    for picture in ("curves", "neighbour_strips"):  # a second each
        monkeypatch.setattr(pretrain, picture, lambda *args: None)
    tiny = ["encoder.width=0.0625", "method.queue_size=32", "method.bn_groups=2", "trainer.accelerator=cpu"]
    losses = [
        run([*small(tmp_path), *tiny, "trainer.max_epochs=1", "monitor.k=5", f"run_dir={tmp_path / name}"])["loss"]
        for name in ("once", "again")
    ]
    assert losses[0] == losses[1]


def test_a_bank_takes_a_single_view_and_none_takes_two(capsys, tmp_path):
    bank = [*small(tmp_path), "method=instdisc", "method.negatives=8"]
    data = images(composed([*bank, "views.count=1"]))
    assert [x.shape for x in data.views(data.train.images[:4], range(4), 0)] == [(4, 3, 16, 16)]
    assert not build_method(composed([*bank, "views.count=1"]), data.train).compares_views
    assert main([*bank, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "method=instdisc learns from one view of an image but the configured views give 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"operations": -1}, {"magnitude": 11}, {"gray": 2}, {"scale": (0.5, 2)}, {"size": 0}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        InfoMin(**{"size": 8} | wrong)


def test_a_misspelt_setting_is_one_line(capsys, tmp_path):
    assert main([*small(tmp_path), "views.strenght=1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "views.strenght is no setting; views has size, count, scale, strength" in line
