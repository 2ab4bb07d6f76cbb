"""The loader: every image once, the same for any number of ranks, resumable, safe buffers, no stray threads."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runs import Flaky, Pull, image_set, images, trainer
from sslzoo.data.decode import CorruptImage
from sslzoo.data.module import Loader, Reader, clean_batches, default_workers, epoch_order
from sslzoo.errors import UserError
from sslzoo.views import Clean, View, Views

VIEWS = Views([View(8, count=2), View(4)])


def loader(train=None, batch_size=4, **options) -> Loader:
    return Loader(image_set(26) if train is None else train, VIEWS, batch_size, workers=2, **options)


def epoch(source: Loader) -> list:
    """One epoch's batches, copied: the loader overwrites its buffers."""
    return [type(b)([x.clone() for x in b.views], b.index.clone(), b.label.clone()) for b in source]


def assert_equal(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.label, other.label)
        assert all(torch.equal(x, y) for x, y in zip(one.views, other.views, strict=True))


# What comes out


def test_every_image_comes_once_an_epoch_in_an_order_that_changes_with_epoch_and_seed():
    source = loader(batch_size=2)
    orders = [torch.cat([batch.index for batch in epoch(source)]).tolist() for _ in range(3)]
    assert [sorted(order) for order in orders] == [list(range(26))] * 3
    other = torch.cat([batch.index for batch in epoch(loader(batch_size=2, seed=1))]).tolist()
    assert len({tuple(order) for order in [*orders, other]}) == 4
    assert orders[1] == epoch_order(0, 1, 26).tolist()


def test_a_last_batch_that_is_not_full_is_dropped():
    source = loader(batch_size=4)
    batches = epoch(source)
    assert len(source) == len(batches) == 6
    assert {len(batch.index) for batch in batches} == {4}
    assert len(torch.cat([batch.index for batch in batches]).unique()) == 24


def test_views_and_labels_belong_to_the_rows_they_come_with():
    source = loader(seed=5)
    epoch(source)
    for batch in epoch(source):
        expected = VIEWS(source.images.images[batch.index.numpy()], batch.index.numpy(), 1)
        assert all(torch.equal(x, y) for x, y in zip(batch.views, expected, strict=True))
        assert batch.label.tolist() == (batch.index % 3).tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_cut_one_ranks_batch_into_its_rows(world):
    whole = epoch(loader(batch_size=8))
    parts = [epoch(loader(batch_size=8, rank=rank, world=world)) for rank in range(world)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch.index, torch.cat([share.index for share in shares]))
        for v, x in enumerate(batch.views):
            assert torch.equal(x, torch.cat([share.views[v] for share in shares]))


def test_worker_count_and_where_images_live_change_no_bit():
    plain = epoch(loader())
    assert_equal(epoch(Loader(image_set(26), VIEWS, 4, workers=7)), plain)
    assert_equal(epoch(loader(Flaky(image_set(26)))), plain)


@pytest.mark.parametrize("position", [0, 2, 6, 9])
def test_goes_on_from_any_position_as_if_it_had_not_stopped(position):
    unbroken = loader()
    batches = epoch(unbroken) + epoch(unbroken)
    resumed = loader()
    resumed.load_state_dict({"position": position})
    left = 6 - position % 6
    assert_equal(epoch(resumed), batches[position : position + left])
    assert resumed.state_dict() == {"position": position + left}


def test_position_counts_batches_given_out_and_not_those_made_ahead():
    source = loader()
    iterator = iter(source)
    for given in range(1, 4):
        next(iterator)
        assert source.position == given
    iterator.close()
    rest = epoch(source)  # picks up after the third batch
    assert_equal(rest, epoch(loader())[3:])


def test_a_batch_stays_intact_until_the_next_is_taken():
    source, expected = loader(), epoch(loader())
    for batch, meant in zip(source, expected, strict=True):
        time.sleep(0.02)  # the loader runs ahead as far as it may
        assert all(torch.equal(x, y) for x, y in zip(batch.views, meant.views, strict=True))


def test_buffers_are_reused():
    places = [batch.views[0].data_ptr() for batch in loader(image_set(80))]
    assert len(places) == 20
    assert len(set(places)) == Loader.AHEAD + 1


def test_buffers_that_a_gpu_still_reads_are_not_written_to(monkeypatch):
    copied = threading.Event()
    monkeypatch.setattr("sslzoo.data.module._event", lambda: SimpleNamespace(synchronize=copied.wait))
    views = Views([View(8)])
    views.buffers, pinned = lambda batch, pin: pinned.append(pin) or Views.buffers(views, batch), []
    source = Loader(image_set(26), views, 4, workers=2, pin=True)
    made = []
    source.make, make = lambda position, out: made.append(position) or make(position, out), source.make
    iterator = iter(source)
    next(iterator), next(iterator)  # the first batch's buffers are free once its copy is done
    wait_until(lambda: made == [0, 1, 2])
    time.sleep(0.05)
    assert made == [0, 1, 2]
    copied.set()
    wait_until(lambda: made == [0, 1, 2, 3])
    assert pinned == [True] * 3


def test_batches_are_made_ahead_of_being_asked_for():
    source = loader(Flaky(image_set(26), slow=0.01))
    made = []
    source.make, make = lambda position, out: made.append(position) or make(position, out), source.make
    iterator = iter(source)
    next(iterator)
    wait_until(lambda: made == [0, 1, 2])
    time.sleep(0.05)
    assert made == [0, 1, 2]
    iterator.close()


# When something goes wrong


def wait_until(happened, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_a_damaged_image_is_raised_where_batches_are_taken():
    broken = int(epoch_order(0, 0, 26)[9])
    source = loader(Flaky(image_set(26), {broken}))
    with pytest.raises(CorruptImage, match=rf"{broken}\.png"):
        epoch(source)
    assert source.position == 2  # the batches before it were given out


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_abandoned_iterator_leaves_no_thread_behind(taken):
    before = set(threading.enumerate())
    source = loader(Flaky(image_set(26), slow=0.001))
    iterator = iter(source)
    for _ in range(taken):
        next(iterator)
    del iterator, source
    gc.collect()
    wait_until(lambda: not set(threading.enumerate()) - before)


def test_a_finished_or_failed_epoch_leaves_no_producer_behind():
    source = loader()
    epoch(source)
    failing = loader(Flaky(image_set(26), {3}))
    with pytest.raises(CorruptImage):
        epoch(failing)
    wait_until(lambda: not threads("views-producer"))


def test_skip_puts_the_next_readable_image_in_place_of_a_damaged_one():
    whole = epoch(loader())
    source = loader(Flaky(image_set(26), {0, 4, 5, 25}), on_error="skip")
    stands_in = {0: 1, 4: 6, 5: 6, 25: 1}
    for batch, meant in zip(epoch(source), whole, strict=True):
        rows = [stands_in.get(row, row) for row in meant.index.tolist()]
        assert batch.index.tolist() == rows
        assert batch.label.tolist() == [row % 3 for row in rows]
        expected = VIEWS(image_set(26).images[rows], rows, 0)
        assert all(torch.equal(x, y) for x, y in zip(batch.views, expected, strict=True))
    assert source.reader.skipped <= {0, 4, 5, 25}
    assert source.reader.skipped >= stands_in.keys() & {row for batch in whole for row in batch.index.tolist()}


def test_a_set_without_a_readable_image_is_the_users_error():
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="no image of noise can be read"):
        Reader(Flaky(image_set(5), range(5)), pool, "skip")(np.array([2]))


def test_a_batch_that_does_not_split_over_devices_is_refused():
    with pytest.raises(UserError, match="batch_size=4 does not split evenly over 3 devices"):
        loader(batch_size=4, world=3)


def test_workers_are_at_least_one_and_leave_cores_to_torch(monkeypatch):
    for cores, workers in ((1, 1), (2, 1), (9, 4), (200, 16)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: range(cores))
        assert default_workers() == workers


# Clean views


@pytest.mark.parametrize("rows", [None, [5, 0, 25, 5], list(range(9))])
@pytest.mark.parametrize("on_disk", [False, True])
def test_clean_batches_keep_the_order_they_are_asked_in(rows, on_disk):
    whole = image_set(26, size=9)
    found = list(clean_batches(Flaky(whole) if on_disk else whole, Clean(8), 4, rows))
    asked = list(range(26)) if rows is None else rows
    assert np.concatenate([part for _, part in found]).tolist() == asked
    assert [len(x) for x, _ in found] == [min(4, len(asked) - start) for start in range(0, len(asked), 4)]
    assert torch.equal(torch.cat([x for x, _ in found]), Clean(8)(whole.images[asked]))


def test_clean_batches_stop_at_a_damaged_image_or_leave_it_out():
    broken = Flaky(image_set(10), {2, 3, 4, 5, 9})
    with pytest.raises(CorruptImage):
        list(clean_batches(broken, Clean(8), 4))
    found = list(clean_batches(broken, Clean(8), 2, on_error="skip"))
    assert [part.tolist() for _, part in found] == [[0, 1], [6, 7], [8]]
    assert torch.equal(torch.cat([x for x, _ in found]), Clean(8)(image_set(10).images[[0, 1, 6, 7, 8]]))


def test_clean_batches_leave_no_thread_behind_when_abandoned():
    before = set(threading.enumerate())
    batches = clean_batches(Flaky(image_set(26)), Clean(8), 2)
    next(batches)
    del batches
    wait_until(lambda: not set(threading.enumerate()) - before)


# As Lightning's data module


class Seeing(Pull):
    """Copies what reaches the loss."""

    def loss(self, batch):
        self.seen = [*getattr(self, "seen", []), [x.clone() for x in batch.views]]
        return super().loss(batch)


def test_views_reach_the_loss_as_they_were_made():
    data, method = images(), Seeing()
    trainer(max_epochs=2).fit(method, datamodule=data)
    meant = Loader(data.train, data.views, data.batch_size)
    expected = epoch(meant) + epoch(meant)
    assert len(method.seen) == 12
    for views, batch in zip(method.seen, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(views, batch.views, strict=True))


def test_where_a_run_stands_goes_through_its_state():
    data = images()
    assert data.state_dict() == {"position": 0}
    trainer(max_epochs=1).fit(Pull(), datamodule=data)
    assert data.state_dict() == {"position": 6}
    other = images()
    other.load_state_dict(data.state_dict())
    method = Seeing()
    trainer(max_epochs=1).fit(method, datamodule=other)
    assert other.loader.position == 12
    rows = epoch_order(0, 1, 24)[:4]
    assert torch.equal(method.seen[0][0], data.views(data.train.images[rows], rows, 1)[0])


def test_an_unknown_way_with_errors_is_refused():
    with pytest.raises(UserError, match=r"data\.on_error=ignore is neither raise nor skip"):
        images(on_error="ignore")


def test_pictures_that_could_not_be_read_are_named():
    train = Flaky(image_set(24), {3, 7})
    train.files = [f"{row}.png" for row in range(24)]
    data = images(train, on_error="skip")
    assert data.skipped == []
    trainer(max_epochs=1).fit(Pull(), datamodule=data)
    assert [str(file) for file in data.skipped] == ["3.png", "7.png"]
