"""Batches of two sets: a student's really half and half, each set in its own order, and where it stood."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sslzoo.data.box_module import BoxBatch
from sslzoo.data.mixed import JointBatch, Mixed, MixedBatch, MixedLoader
from sslzoo.data.module import epoch_order
from sslzoo.dist import rank, world


class Rows:
    """A loader of row numbers, in the order that all loaders of sslzoo have."""

    def __init__(self, images: int, batch_size: int, seed: int):
        self.images, self.batch_size, self.seed, self.position = images, batch_size, seed, 0

    def __len__(self):
        return self.images // self.batch_size

    def __iter__(self):
        epoch = self.position // len(self)
        share = self.batch_size // world()
        while self.position < (epoch + 1) * len(self):
            start = (self.position % len(self)) * self.batch_size + rank() * share
            rows = epoch_order(self.seed, epoch, self.images)[start : start + share]
            self.position += 1
            yield BoxBatch([], [], torch.from_numpy(rows))


def loader(human: int = 12, pseudo: int = 20, batch_size: int = 4) -> MixedLoader:
    return MixedLoader(Rows(human, batch_size, seed=0), Rows(pseudo, batch_size, seed=1))


def taken(mixed: MixedLoader, epochs: int) -> list[tuple[list[int], list[int]]]:
    return [(batch.human.index.tolist(), batch.pseudo.index.tolist()) for _ in range(epochs) for batch in mixed]


@pytest.mark.parametrize("pseudo", [20, 6])
def test_every_step_has_as_many_of_both_and_each_set_its_own_epochs(pseudo):
    mixed = loader(pseudo=pseudo)
    steps = taken(mixed, 10)
    assert len(mixed) == 3
    assert len(steps) == mixed.position == 30
    assert all(len(human) == len(other) == 4 for human, other in steps)
    for half, images, seed in ((0, 12, 0), (1, pseudo, 1)):
        an_epoch = images // 4
        for epoch in range(30 // an_epoch):
            rows = [row for step in steps[epoch * an_epoch : (epoch + 1) * an_epoch] for row in step[half]]
            assert rows == epoch_order(seed, epoch, images)[: an_epoch * 4].tolist()


@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_both_halves_go_on_where_they_stood(stop):
    whole, broken, later = loader(), loader(), loader()
    expected = taken(whole, 4)
    batches = iter(batch for _ in range(4) for batch in broken)
    for _ in range(stop):
        next(batches)
    later.load_state_dict(broken.state_dict())
    assert (later.first.position, later.second.position) == (stop, stop)
    assert taken(later, 4 - stop // 3) == expected[stop:]


def test_a_batch_that_was_made_ahead_is_not_lost():
    mixed = loader()
    batches = iter(mixed)
    next(batches)
    batches.close()
    assert mixed.position == mixed.second.position == 1


def test_halves_of_unlike_sizes_are_refused():
    with pytest.raises(ValueError, match="halves of 4 and 3"):
        MixedLoader(Rows(12, 4, 0), Rows(12, 3, 0))


def beside(second) -> tuple[MixedLoader, Rows]:
    """Half and half, and five images of a third set beside."""
    third = Rows(17, 5, seed=2)
    return MixedLoader(second, third, JointBatch), third


def test_images_of_another_task_come_in_batches_of_their_own_size_and_are_not_counted():
    mixed, third = beside(loader())
    batches = [batch for _ in range(4) for batch in mixed]
    assert (len(mixed), mixed.batch_size, mixed.position, third.position) == (3, 8, 12, 12)
    assert taken(loader(), 4) == [(b.first.human.index.tolist(), b.first.pseudo.index.tolist()) for b in batches]
    assert all(torch.equal(batch.index, batch.first.index) and len(batch.index) == 8 for batch in batches)
    rows = [batch.classified.index.tolist() for batch in batches]
    assert rows == [epoch_order(2, k // 3, 17)[5 * (k % 3) :][:5].tolist() for k in range(12)]


@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_all_three_sets_go_on_where_they_stood(stop):
    def told(mixed, epochs):
        return [(b.index.tolist(), b.classified.index.tolist()) for _ in range(epochs) for b in mixed]

    whole, (broken, _), (later, third) = told(beside(loader())[0], 4), beside(loader()), beside(loader())
    batches = iter(batch for _ in range(4) for batch in broken)
    for _ in range(stop):
        next(batches)
    later.load_state_dict(broken.state_dict())
    assert (later.first.first.position, later.first.second.position, third.position) == (stop, stop, stop)
    assert told(later, 4 - stop // 3) == whole[stop:]


class Module(SimpleNamespace):
    """A data module of ``Rows``."""

    def train_dataloader(self):
        self.loader = Rows(self.images, self.batch_size, self.seed)
        return self.loader


def test_where_a_data_module_stands_is_in_the_checkpoint():
    def module() -> Mixed:
        halves = [Module(images=n, batch_size=4, seed=k, val="val", skipped=[]) for k, n in enumerate((12, 20))]
        mixed = Mixed(*halves)
        mixed.trainer = SimpleNamespace(global_rank=0, world_size=1)
        return mixed

    first, second = module(), module()
    assert (first.batch_size, first.val, first.skipped) == (8, "val", [])
    assert first.state_dict() == {"position": 0}
    taken(first.train_dataloader(), 2)
    assert first.state_dict() == {"position": 6}
    second.load_state_dict(first.state_dict())
    assert taken(second.train_dataloader(), 1) == taken(first.loader, 1)


def test_a_data_module_inside_another_stands_where_that_one_does():
    parts = [
        Module(images=n, batch_size=b, seed=k, val=n, skipped=[n])
        for k, (n, b) in enumerate([(12, 4), (20, 4), (17, 5)])
    ]
    halves = Mixed(*parts[:2], MixedBatch)
    mixed = Mixed(halves, parts[2], JointBatch)
    mixed.trainer = SimpleNamespace(global_rank=0, world_size=1)
    assert (mixed.batch_size, mixed.val, mixed.skipped) == (8, 12, [12, 17, 20])
    mixed.load_state_dict({"position": 5})
    mixed.train_dataloader()
    assert [part.loader.position for part in parts] == [halves.loader.position, 5, 5] == [5, 5, 5]
    next(iter(mixed.loader))
    assert mixed.state_dict() == {"position": 6}


def test_ranks_share_both_halves_of_the_same_step(monkeypatch):
    whole = taken(loader(), 4)
    monkeypatch.setattr("test_mixed.world", lambda: 2)
    parts = []
    for place in (0, 1):
        monkeypatch.setattr("test_mixed.rank", lambda place=place: place)
        parts.append(taken(loader(), 4))
    joined = [tuple(a + b for a, b in zip(one, other, strict=True)) for one, other in zip(*parts, strict=True)]
    assert joined == whole
    assert np.shape(parts[0]) == (12, 2, 2)
