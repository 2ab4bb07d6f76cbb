"""A transform from elsewhere: reproducible in processes of its own, and no business of the training beside it."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from runs import Pixels, Pull, image_set, images, trainer, weights
from sslzoo.data.module import Images
from sslzoo.errors import UserError
from sslzoo.views import Clean, FromTransform
from sslzoo.views.draw import key

STACK = image_set(6, size=16).images


class Draws:
    """An image of numbers from all three generators, drawn slowly, twice."""

    def __call__(self, image: Image.Image) -> list[Tensor]:
        drawn = []
        for _ in range(2):
            time.sleep(0.002)
            numbers = [random.random(), np.random.rand(), torch.rand(()).item(), np.asarray(image).mean() / 255]  # noqa: NPY002
            drawn.append(torch.tensor(numbers * 48, dtype=torch.float32).view(3, 8, 8))
        return drawn


class Moody:
    """One tensor; but it fails on a black image, and ends its process on a white one."""

    def __call__(self, image: Image.Image) -> Tensor:
        first = image.getpixel((0, 0))
        if first == (255, 255, 255):
            os._exit(3)
        if first == (0, 0, 0):
            raise ValueError("too dark for me")
        return to_tensor(image)


@pytest.fixture(scope="module", autouse=True)
def _what_processes_need_is_imported_once():
    get_context("forkserver").set_forkserver_preload(["sslzoo.methods", "sslzoo.tasks.pretrain"])


@pytest.fixture(scope="module")
def lightlys():
    from lightly.transforms import MoCoV2Transform

    return FromTransform(MoCoV2Transform(input_size=16), seed=3)


@pytest.fixture(scope="module")
def draws():
    return FromTransform(Draws(), seed=1)


def here(images, index: list[int], epoch: int, seed: int) -> list[Tensor]:
    """The views of ``Draws`` made in this process."""
    made = []
    for image, i in zip(images, index, strict=True):
        drawn = key(seed, epoch, i)
        seed_all(drawn)
        made.append(Draws()(Image.fromarray(image)))
    return [torch.stack(view) for view in zip(*made, strict=True)]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch.manual_seed(seed)


def states() -> tuple:
    """Where the three generators of this process stand."""
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


def test_a_view_is_a_function_of_seed_epoch_and_image_and_not_of_its_batch(lightlys):
    first, second = lightlys(STACK[:3], [5, 6, 7], 0)
    assert first.shape == second.shape == (3, 3, 16, 16)
    assert first.dtype == torch.float32
    for whole, alone in zip((first, second), lightlys(STACK[2:3], [7], 0), strict=True):
        assert torch.equal(alone, whole[2:])
    assert not torch.equal(first, second)
    assert not torch.equal(lightlys(STACK[:3], [5, 6, 7], 1)[0], first)
    assert not torch.equal(lightlys(STACK[2:3], [8], 0)[0], first[2:])


def test_views_are_those_of_the_transform_seeded_here_whatever_the_number_of_processes(draws):
    several = FromTransform(Draws(), seed=2, workers=2)
    for views, seed in ((draws, 1), (several, 2)):
        found = views(STACK, [4, 9, 0, 1, 2, 3], 2)
        for view, expected in zip(found, here(STACK, [4, 9, 0, 1, 2, 3], 2, seed), strict=True):
            assert torch.equal(view, expected)


def test_generators_of_this_process_stay_as_they_are_even_while_views_are_made(draws):
    def numbers(pause: float) -> list[float]:
        seed_all(5)
        found = []
        for _ in range(40):
            found += [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002
            time.sleep(pause)
        return found

    draws(STACK, range(6), 0)  # the process has begun
    alone, before = numbers(0.0), states()
    views = threading.Thread(target=lambda: [draws(STACK, range(6), epoch) for epoch in range(8)])
    views.start()
    beside = numbers(0.002)
    assert views.is_alive()  # the two did overlap
    views.join()
    assert beside == alone
    assert states() == before


def test_dropout_trained_beside_a_transform_gives_the_same_weights_twice_and_those_of_ready_views(draws):
    class Ready:
        """The same views, made before."""

        def __init__(self):
            made = [draws(image_set().images, range(24), epoch) for epoch in range(3)]
            self.made = [[view.clone() for view in views] for views in made]

        def buffers(self, batch, pin=False):
            return None

        def __call__(self, images, index, epoch, out=None, pool=None):
            return [view[torch.as_tensor(index)] for view in self.made[epoch]]

    def trained(views) -> Tensor:
        torch.manual_seed(0)
        method = Pull(Pixels(dropout=0.5))
        data = Images(image_set(), None, views, Clean(8), batch_size=4, workers=1)
        trainer(max_epochs=3).fit(method, datamodule=data)
        return weights(method)

    first = trained(draws)
    assert torch.equal(first, trained(draws))
    assert torch.equal(first, trained(Ready()))
    assert not torch.equal(first, trained(images().views))


def test_what_cannot_be_sent_to_a_process_is_refused_at_once():
    with pytest.raises(UserError, match=r"the transform function must be sent to a process of its own, but .*lambda"):
        FromTransform(lambda image: image)


def test_one_tensor_is_one_view_a_failure_says_why_and_a_process_that_ends_is_named():
    views, black = FromTransform(Moody()), np.zeros((1, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="too dark for me"):
        views(black, [0], 0)
    (view,) = views(black + 51, [0], 0)
    torch.testing.assert_close(view, torch.full((1, 3, 4, 4), 0.2))
    with pytest.raises(UserError, match="the process that runs the transform Moody ended"):
        views(black + 255, [0], 0)


KILLED = """
import os, signal
import numpy as np
from torchvision.transforms import ToTensor
from sslzoo.views import FromTransform
if __name__ == "__main__":
    views = FromTransform(ToTensor())
    views(np.zeros((1, 4, 4, 3), np.uint8), [0], 0)
    print(*views._processes._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_processes_end_with_a_run_that_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (worker,) = map(int, done.stdout.split())
    for _ in range(200):
        if not os.path.exists(f"/proc/{worker}"):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the process outlived its parent")
