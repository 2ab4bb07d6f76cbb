"""Features on disk, computed once for a backbone and a set, whatever asks for them."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sslzoo import __version__
from sslzoo.blocks import Encoder
from sslzoo.data.images import ImageSet
from sslzoo.downstream.features import feature_batches
from sslzoo.errors import UserError
from sslzoo.views import Clean

log = logging.getLogger(__name__)


def cache_folder(setting: str | None) -> Path | None:
    """The folder that ``task.cache`` means: ``auto`` is ``sslzoo/features`` in the user's cache, None is none.

    Where ``auto`` cannot be made, as in a container without a home, there is none either, and the log says so.

    Raises:
        UserError: if a folder that was named cannot be made.
    """
    if setting is None:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home, "sslzoo", "features").expanduser() if setting == "auto" else Path(setting).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if setting != "auto":
            raise _unwritable(folder, error) from error
        log.warning("%s cannot be made (%s), so features are not kept; task.cache=DIR names another", folder, error)
        return None
    return folder


def weights_hash(encoder: Encoder) -> str:
    """16 hex digits of an encoder's parameters, buffers and settings."""
    digest = hashlib.blake2b(json.dumps([type(encoder).__name__, encoder.config], sort_keys=True).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass
class Cache:
    """Features of image sets, kept in ``folder``.

    An entry is a directory named by all that its features depend on: weights, images, the view of evaluation, rows,
    kind of feature, version. Whatever changes, another entry is made; entries that nobody asks for any more may be
    deleted by hand at any time. An entry appears whole or not at all.

    Args:
        folder: where; None keeps nothing.
        limit_mb: features larger than this (2**20 bytes) are written and read through a memory map; with no folder to
            write to, they stay in memory.
    """

    folder: Path | None = None
    limit_mb: float = 2048

    def features(
        self,
        encoder: Encoder,
        images: ImageSet,
        clean: Clean,
        kinds: Sequence[str] = ("last",),
        rows: np.ndarray | None = None,
        on_error: str = "raise",
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Features of ``rows`` (default: all), ``{kind: (n, D_kind)}`` float32, and the rows they belong to ``(n,)``.

        Raises:
            UserError: if features are not finite, or cannot be written.
        """
        rows = np.arange(len(images)) if rows is None else np.asarray(rows)
        if self.folder is None:
            return self._extracted(encoder, images, clean, kinds, rows, on_error, {})
        key = _key(encoder, images, clean, rows, on_error)
        places = {kind: self.folder / f"{key}-{kind}" for kind in kinds}
        found = {kind: self._read(place) for kind, place in places.items()}
        missing = {kind: places[kind] for kind in kinds if found[kind] is None}
        if missing:
            try:
                made, kept = self._extracted(encoder, images, clean, tuple(missing), rows, on_error, missing)
            except OSError as error:
                raise _unwritable(self.folder, error) from error
            found |= {kind: (z, kept) for kind, z in made.items()}
        return {kind: found[kind][0] for kind in kinds}, found[kinds[0]][1]

    def _read(self, place: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """An entry, memory-mapped if it is large; None if it is not there, or damaged."""
        try:
            rows, file = np.load(place / "rows.npy"), place / "features.npy"
            large = file.stat().st_size > self.limit_mb * 2**20
            return np.load(file, mmap_mode="r" if large else None)[: len(rows)], rows
        except (OSError, ValueError, EOFError):
            return None

    def _extracted(
        self, encoder, images, clean, kinds, rows, on_error, places: dict[str, Path]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Features computed now, written to ``places`` as they come if they are large, else at the end."""
        partial = {kind: place.with_name(f".{place.name}.{os.getpid()}.partial") for kind, place in places.items()}
        arrays: dict[str, np.ndarray] = {}
        kept: list[np.ndarray] = []
        done = 0
        try:
            for folder in partial.values():
                folder.mkdir()
            for found, part in feature_batches(encoder, images, clean, kinds, rows, on_error=on_error):
                for kind, h in found.items():
                    if kind not in arrays:
                        arrays[kind] = self._array((len(rows), h.shape[1]), partial.get(kind))
                    arrays[kind][done : done + len(part)] = h.cpu().numpy()
                kept.append(part)
                done += len(part)
            read = np.concatenate(kept)  # fewer than were asked where damaged images are skipped
            for kind, folder in partial.items():
                if not isinstance(arrays[kind], np.memmap):
                    np.save(folder / "features.npy", arrays[kind][:done])
                else:
                    arrays[kind].flush()
                np.save(folder / "rows.npy", read)
                _rename(folder, places[kind])
        finally:
            for folder in partial.values():
                shutil.rmtree(folder, ignore_errors=True)
        return {kind: z[:done] for kind, z in arrays.items()}, read

    def _array(self, shape: tuple[int, int], folder: Path | None) -> np.ndarray:
        if folder is None or 4 * shape[0] * shape[1] <= self.limit_mb * 2**20:
            return np.empty(shape, np.float32)
        return np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float32, shape=shape)


def _key(encoder: Encoder, images: ImageSet, clean: Clean, rows: np.ndarray, on_error: str) -> str:
    """Weights, images, and the rest: three hashes."""
    rest = hashlib.blake2b(repr((__version__, clean.settings, on_error)).encode(), digest_size=8)
    rest.update(np.ascontiguousarray(rows, dtype=np.int64).data)
    return f"{weights_hash(encoder)}-{images.fingerprint()}-{rest.hexdigest()}"


def _rename(partial: Path, place: Path) -> None:
    """``partial`` becomes ``place``; an entry that is there is damaged, or another process has just made it."""
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)


def _unwritable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"task.cache={folder} cannot be written: {reason}; name another folder, or null to keep nothing")
