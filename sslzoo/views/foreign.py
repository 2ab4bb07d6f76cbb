"""Transforms of PIL images from elsewhere, such as lightly's or torchvision's, called like our own views."""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from sslzoo.errors import UserError
from sslzoo.views import draw

Transform = Callable[[Image.Image], Tensor | Sequence[Tensor]]


class FromTransform:
    """Any transform of a PIL image into tensors, called like :class:`sslzoo.views.Views`: slow, but reproducible.

    It runs in processes of its own. Such a transform draws from the generators of torch, NumPy and ``random``, which
    all threads of a process share: seeded beside a training step they would disturb its dropout, and be disturbed.
    There they are seeded from (seed, epoch, index) for each image, so neither the number of processes nor the batch
    changes a view.

    Args:
        transform: of one image, into one tensor (3, S, S) or several. It is pickled, so it must be an object that a
            new process can import: no lambda, nothing defined in a notebook.
        seed: of the views.
        workers: processes. They start with the first batch and end with this process.

    Raises:
        UserError: if ``transform`` cannot be pickled.
    """

    def __init__(self, transform: Transform, seed: int = 0, workers: int = 1):
        self.transform, self.seed, self.workers = transform, seed, workers
        try:
            self._pickled = pickle.dumps(transform)
        except Exception as error:  # what cannot be pickled says so in many types
            raise UserError(
                f"the transform {type(transform).__name__} must be sent to a process of its own, but {error};"
                " define what it is made of in a module, without lambdas"
            ) from error
        self._processes: ProcessPoolExecutor | None = None

    def buffers(self, batch: int, pin: bool = False) -> None:
        """Nothing to reuse: a transform makes its own tensors."""

    def __call__(
        self,
        images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
        index: ArrayLike,
        epoch: int,
        out: None = None,
        pool: Executor | None = None,
    ) -> list[Tensor]:
        """Make the transform's views of a batch: V x (B, 3, S, S). ``out`` and ``pool`` change nothing.

        Raises:
            UserError: if a new process cannot import the transform, or was ended.
        """
        if self._processes is None:
            # Not forked from here: a copy of a process that holds threads and a GPU is none to work in.
            self._processes = ProcessPoolExecutor(self.workers, get_context("forkserver"), _begin, (self._pickled,))
        keys = [draw.key(self.seed, epoch, i) for i in np.asarray(index, np.int64).tolist()]
        share = -(-len(keys) // (2 * self.workers))  # two parts a process, to even out what they cost
        try:
            made = list(self._processes.map(_views, images, keys, chunksize=share))
        except BrokenProcessPool as error:
            raise UserError(
                f"the process that runs the transform {type(self.transform).__name__} ended, see above; it must be able"
                " to import all that the transform is made of"
            ) from error
        return [torch.from_numpy(np.stack(view)) for view in zip(*made, strict=True)]


_transform: Transform | None = None  # of this process, where it is one of those that work


def _begin(pickled: bytes) -> None:
    """Make ready a process: it leaves interrupts to its parent, and ends with it even where that is killed."""
    global _transform
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    _transform = pickle.loads(pickled)


def _views(image: NDArray[np.uint8], key: int) -> list[NDArray[np.float32]]:
    """The transform's views of one image under the generators' seed ``key``, as arrays: these are sent as they are."""
    torch.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002
    views = _transform(Image.fromarray(np.asarray(image)))
    return [view.numpy() for view in ([views] if isinstance(views, Tensor) else views)]
