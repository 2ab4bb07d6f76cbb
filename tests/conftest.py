"""What tests share: oracles, a tiny encoder, two ranks."""

import io
import json
import os
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import nn

DATA = Path(__file__).parent / "data"
torch.set_num_threads(1)  # before any fixture: sums are the same to the bit for one number of threads only


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _features_of_tests_are_kept_apart(tmp_path_factory):
    os.environ["SSLZOO_CACHE"] = str(tmp_path_factory.mktemp("features"))


class Oracle(dict):
    """Arrays that an official implementation computed, as tensors; ``oracle("a/*")`` is a state dict."""

    def __call__(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix + "/"): value for key, value in self.items() if key.startswith(prefix + "/")}


@pytest.fixture
def oracle():
    """Loader of ``tests/data/oracles/NAME.npz``; where each comes from stands in its ``meta``."""

    def load(name: str) -> Oracle:
        with np.load(DATA / "oracles" / f"{name}.npz") as file:
            found = Oracle({key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != "meta_json"})
            found.meta = json.loads(str(file["meta_json"]))
        return found

    return load


class Tiny(nn.Sequential):
    """An encoder on vectors, as the oracles use: no bias, optional BatchNorm, ReLU."""

    def __init__(self, before: int = 12, dim: int = 14, norm: bool = True):
        layers = [nn.Linear(before, dim, bias=False)] + ([nn.BatchNorm1d(dim)] if norm else []) + [nn.ReLU()]
        super().__init__(*layers)
        self.dim, self.config = dim, {}


class TinyOfCrops(Tiny):
    """The same for images of 3 channels and any size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def tiny():
    """The class of tiny encoders."""
    return Tiny


def close(actual, expected, rtol=1e-9, atol=1e-10):
    """Equal as float64 oracles are."""
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=rtol, atol=atol)


def on_ranks(world: int, work, *arguments) -> list:
    """``work(rank, *arguments)`` in ``world`` gloo processes on this machine; what each returned, by rank."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sslzoo.methods", "sslzoo.tasks.pretrain"])  # imported once, not in every rank
    results = context.SimpleQueue()
    with TemporaryDirectory() as meeting:  # a file to meet at: a port may be taken
        place = f"file://{meeting}/store"
        ranks = [context.Process(target=_rank, args=(r, world, place, results, work, arguments)) for r in range(world)]
        for rank in ranks:
            rank.start()
        found = dict(torch.load(io.BytesIO(results.get()), weights_only=False) for _ in ranks)
        for rank in ranks:
            rank.join(60)
    failed = [value for value in found.values() if isinstance(value, BaseException)]
    if failed:
        raise failed[0]
    return [found[r] for r in range(world)]


def _rank(rank, world, place, results, work, arguments):
    torch.set_num_threads(1)
    try:
        patience = timedelta(minutes=3)  # ranks that wait for each other fail and do not hang
        torch.distributed.init_process_group("gloo", place, patience, world, rank)
        result = work(rank, *arguments)
    except BaseException as error:
        result = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
    content = io.BytesIO()
    torch.save((rank, result), content)  # as bytes: tensors would be shared with a process that is gone
    results.put(content.getvalue())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
