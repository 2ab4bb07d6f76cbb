"""Features on disk: found again, never out of date, whole or not there."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runs import Flaky, Pixels, image_set
from sslzoo.downstream import cache as module
from sslzoo.downstream import features as feature_module
from sslzoo.downstream.cache import Cache, cache_folder, weights_hash
from sslzoo.downstream.features import features, unit
from sslzoo.downstream.logistic import Head, Rows, hits, logistic
from sslzoo.errors import UserError
from sslzoo.tasks.knn import vote
from sslzoo.views import Clean


class Counted(Pixels):
    """Counts the images it has seen; ``config`` as an encoder has it."""

    def __init__(self):
        super().__init__()
        self.config, self.seen = {"name": "pixels"}, 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


@pytest.fixture
def encoder():
    return Counted()


def test_features_are_computed_once_and_are_those_without_a_cache(tmp_path, encoder):
    images = image_set()
    first, rows = Cache(tmp_path).features(encoder, images, Clean(8))
    again, _ = Cache(tmp_path).features(encoder, images, Clean(8))
    assert encoder.seen == 24
    plain, _ = Cache(None).features(encoder, images, Clean(8))
    assert encoder.seen == 48
    assert first["last"].dtype == np.float32
    assert np.array_equal(first["last"], again["last"])
    assert np.array_equal(first["last"], plain["last"])
    assert rows.tolist() == list(range(24))
    np.testing.assert_array_equal(unit(first["last"]), features(encoder, images, Clean(8))[0])


@pytest.mark.parametrize("limit_mb", [0, 1])
def test_large_features_are_mapped_and_equal(tmp_path, encoder, limit_mb):
    images = image_set()
    cache = Cache(tmp_path, limit_mb)
    for _ in range(2):  # as they are made, and as they are read
        found = cache.features(encoder, images, Clean(8))[0]["last"]
        assert isinstance(found, np.memmap) == (limit_mb == 0)
        np.testing.assert_array_equal(unit(found), features(encoder, images, Clean(8))[0])


def own_memory() -> float:
    """MB of this process's own memory, without what is mapped from files."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0]) / 1024


class Peak:
    """The most own memory that was added within a ``with``, in MB, looked at every millisecond."""

    def __enter__(self):
        self.start, self.added, self.over = own_memory(), 0.0, threading.Event()
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    def look(self):
        while not self.over.wait(0.001):
            self.added = max(self.added, own_memory() - self.start)

    def __exit__(self, *_):
        self.over.set()
        self.watch.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_features_on_disk_are_evaluated_without_being_brought_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_module, "PART", 2**18)  # 1 MB
    n, dim, rng = 48_000, 512, np.random.default_rng(0)
    labels = np.arange(n) % 3
    z = np.lib.format.open_memmap(tmp_path / "features.npy", mode="w+", dtype=np.float32, shape=(n, dim))
    for start in range(0, n, 4000):
        z[start : start + 4000] = rng.standard_normal((4000, dim), np.float32) + labels[start : start + 4000, None]
    z.flush()
    np.save(tmp_path / "rows.npy", np.arange(n))
    bank, rows = Cache(tmp_path, limit_mb=1)._read(tmp_path)
    assert isinstance(bank, np.memmap)
    queries, truth = np.array(bank[:30]) + 0.1, labels[:30]
    size = bank.nbytes / 2**20
    work = {
        "knn": lambda: vote(bank, labels[rows], queries, truth, [1, 20], [0.07]),
        "moments": lambda: Rows(bank, labels).moments(),
        "logistic": lambda: logistic(Rows(bank, labels, np.arange(0, n, 2)), 3, [1e-2], steps=1),
        "hits": lambda: hits(Head(torch.zeros(dim, 3), torch.zeros(3)), Rows(bank, labels)),
    }
    vote(queries, truth, queries, truth, [1], [0.07])  # compiled, and its threads made, before it is measured
    added = {}
    for name, each in work.items():
        with Peak() as peak:
            each()
        added[name] = peak.added
    assert max(added.values()) < size / 3, added
    with Peak() as peak:
        copy = np.array(bank)
    assert copy.nbytes == bank.nbytes
    assert peak.added > 0.9 * size  # a copy would have been noticed


def changed_weights(encoder, images, clean):
    encoder[1].bias.data[0] += 1
    return encoder, images, clean


def changed_settings(encoder, images, clean):
    encoder.config = {"name": "pixels", "colour": "lab"}
    return encoder, images, clean


def changed_pixel(encoder, images, clean):
    pixels = images.images.copy()
    pixels[3, 2, 1, 0] += 1
    return encoder, replace(images, images=pixels), clean


def changed_label(encoder, images, clean):
    return encoder, replace(images, labels=images.labels[::-1].copy()), clean


def changed_colour(encoder, images, clean):
    return encoder, images, Clean(8, mean=(0.5, 0.5, 0.5))


def changed_resize(encoder, images, clean):
    return encoder, images, Clean(8, resize=10)


CHANGES = [changed_weights, changed_settings, changed_pixel, changed_label, changed_colour, changed_resize]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_features_are_computed_anew(tmp_path, encoder, change):
    images, clean = image_set(), Clean(8)
    Cache(tmp_path).features(encoder, images, clean)
    encoder, images, clean = change(encoder, images, clean)
    found, _ = Cache(tmp_path).features(encoder, images, clean)
    assert encoder.seen == 48
    np.testing.assert_array_equal(unit(found["last"]), features(encoder, images, clean)[0])


def test_a_file_that_was_written_to_is_another_set(tmp_path, encoder):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file in files:
        file.write_bytes(b"as it was")
    images = replace(image_set(3), images=None, files=files)
    before = images.fingerprint()
    stat = os.stat(files[1])
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert images.fingerprint() != before


def test_other_rows_are_another_entry(tmp_path, encoder):
    cache, images = Cache(tmp_path), image_set()
    whole, _ = cache.features(encoder, images, Clean(8))
    part, rows = cache.features(encoder, images, Clean(8), rows=np.array([5, 2]))
    assert rows.tolist() == [5, 2]
    np.testing.assert_allclose(part["last"], whole["last"][[5, 2]], atol=1e-6)


@pytest.mark.parametrize("limit_mb", [0, 1])
def test_images_that_cannot_be_read_are_missing_from_the_entry_too(tmp_path, encoder, monkeypatch, limit_mb):
    images = Flaky(image_set(), broken=[3, 23])
    monkeypatch.setattr(Flaky, "fingerprint", lambda self: "flaky")
    for _ in range(2):
        found, rows = Cache(tmp_path, limit_mb).features(encoder, images, Clean(8), on_error="skip")
        assert rows.tolist() == [row for row in range(24) if row not in (3, 23)]
        assert found["last"].shape == (22, 5)
    assert encoder.seen == 22


def test_a_damaged_entry_is_made_again(tmp_path, encoder):
    expected, _ = Cache(tmp_path).features(encoder, image_set(), Clean(8))
    (entry,) = tmp_path.iterdir()
    (entry / "features.npy").write_bytes(b"\x93NUMPY")
    found, _ = Cache(tmp_path).features(encoder, image_set(), Clean(8))
    assert np.array_equal(found["last"], expected["last"])
    assert encoder.seen == 48
    Cache(tmp_path).features(encoder, image_set(), Clean(8))
    assert encoder.seen == 48


def test_what_breaks_off_leaves_nothing(tmp_path, encoder):
    encoder[1].bias.data[2] = float("nan")
    for limit_mb in (0, 1):
        with pytest.raises(UserError, match="not finite"):
            Cache(tmp_path, limit_mb).features(encoder, image_set(), Clean(8))
        assert not list(tmp_path.iterdir())


def test_every_kind_of_feature_is_an_entry_of_its_own_made_in_one_pass(tmp_path, encoder, monkeypatch):
    kinds = {"last": 1.0, "last4": 2.0}
    asked = []

    def batches(encoder, images, clean, wanted, rows, on_error):
        asked.append(wanted)
        yield {kind: torch.full((24, 2), kinds[kind]) for kind in wanted}, np.arange(24)

    monkeypatch.setattr(module, "feature_batches", batches)
    cache = Cache(tmp_path)
    for wanted in (("last",), ("last", "last4"), ("last4", "last")):
        found, _ = cache.features(encoder, image_set(), Clean(8), wanted)
        assert {kind: z[0, 0] for kind, z in found.items()} == {kind: kinds[kind] for kind in wanted}
    assert asked == [("last",), ("last4",)]


def test_weights_are_told_apart_by_value_name_and_settings(encoder):
    other = Counted()
    other.load_state_dict(encoder.state_dict())
    assert weights_hash(other) == weights_hash(encoder)
    other[1].weight.data[0, 0] += 1e-6
    assert weights_hash(other) != weights_hash(encoder)


def test_where_features_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("auto") == tmp_path / "xdg" / "sslzoo" / "features"
    assert cache_folder(str(tmp_path / "here")) == tmp_path / "here"
    assert cache_folder(None) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("auto") == tmp_path / "home" / ".cache" / "sslzoo" / "features"


def test_a_folder_that_cannot_be_made_is_named_and_a_home_that_cannot_is_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"task\.cache=.*file/x cannot be written: .*; name another folder, or null"):
        cache_folder(str(tmp_path / "file" / "x"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder("auto") is None
    assert "features are not kept" in caplog.text


def test_a_disk_that_is_full_is_one_line(tmp_path, encoder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"task\.cache=.* cannot be written: No space left on device"):
        Cache(tmp_path).features(encoder, image_set(), Clean(8))
    assert not list(tmp_path.iterdir())
