"""Two MoCo v2 views of an image: lightly, torchvision, kornia and sslzoo, in CPU time on one thread each.

    python benchmarks/views.py [--rounds 7] [--json out.json]

From uint8 images in memory to a stacked float batch, at 32 pixels (256 images of 32 x 32) and at 224 (24 images
of 500 x 375). All run in one process, in a new order each round; a figure is the median over the rounds, a ratio
the median of the rounds' ratios. CPU time counts, so a busy machine slows the figures more than the ratios.
"""

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path

import numpy as np
import torch
from lightly.transforms import MoCoV2Transform
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from skimage import data
from torchvision.transforms import v2

from sslzoo.views import Blur, Jitter, View, Views
from timing import header

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PEER = "lightly MoCoV2Transform, PIL"


def photographs(count: int, width: int, height: int) -> list[np.ndarray]:
    """Crops of scikit-image's photographs, mirrored every other time: count x (height, width, 3)."""
    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    chance = random.Random(0)
    photos = []
    for k in range(count):
        centre = chance.random(), chance.random()
        photo = ImageOps.fit(Image.fromarray(sources[k % len(sources)]), (width, height), centering=centre)
        photos.append(np.array(ImageOps.mirror(photo) if k % 2 else photo))
    return photos


def torchvision_views(size: int, tensor: bool) -> v2.Compose:
    """MoCo v2's augmentation in torchvision v2; blur reaches 3 sigma, in its two-dimensional convolution."""
    kernel = min(13, 2 * (size // 2) - 1)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, sigma=(0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            *([] if tensor else [v2.ToImage()]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def kornia_views(size: int) -> Callable:
    """The same in kornia, a draw a sample on a whole float batch."""
    import kornia.augmentation as K

    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=(0.2, 1.0)),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(p=0.5),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        same_on_batch=False,
    )


def contestants(images: list[np.ndarray], size: int) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """What is timed: each call makes two views of every image, stacked."""
    pictures = [Image.fromarray(image) for image in images]
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
    lightly, on_pil = MoCoV2Transform(input_size=size), torchvision_views(size, tensor=False)
    on_tensor = torchvision_views(size, tensor=True)

    view = View(size, count=2, jitter=Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), gray=0.2, blur=Blur(0.5))
    ours, index = Views([view], MEAN, STD), np.arange(len(images))
    buffers = ours.buffers(len(images))
    stack = np.stack(images) if size == 32 else images  # photographs come one by one from a decoder

    rows = {
        PEER: lambda: [torch.stack(view) for view in zip(*map(lightly, pictures), strict=True)],
        "torchvision v2, PIL": lambda: [torch.stack([on_pil(image) for image in pictures]) for _ in range(2)],
        "torchvision v2, uint8 tensors": lambda: [
            torch.stack([on_tensor(image) for image in tensors]) for _ in range(2)
        ],
    }
    if importlib.util.find_spec("kornia"):
        batched = kornia_views(size)
        rows["kornia, batched"] = lambda: [batched(torch.stack(tensors).float() / 255) for _ in range(2)]
    epochs = iter(range(10**9))
    rows["sslzoo"] = lambda: ours(stack, index, next(epochs), out=buffers)
    return rows


def measure(rows: dict[str, Callable], count: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of CPU time per image, for each row and round.

    A first call does not count; it tells how many fill a tenth of a second, and so many make a measurement.
    """

    def clock(run: Callable, repeats: int) -> float:
        start = time.process_time()
        for _ in range(repeats):
            run()
        return (time.process_time() - start) / repeats

    first = {name: clock(run, 1) for name, run in rows.items()}
    repeats = {name: ceil(0.1 / max(seconds, 1e-3)) for name, seconds in first.items()}
    times: dict[str, list[float]] = {name: [] for name in rows}
    names = list(rows)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            times[name].append(clock(rows[name], repeats[name]) / count * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)

    console, facts, record = Console(), header(["torch", "torchvision", "lightly", "kornia", "numba", "pillow"]), []
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    for size, count, width, height in ((32, 256, 32, 32), (224, 24, 500, 375)):
        times = measure(contestants(photographs(count, width, height), size), count, arguments.rounds)
        table = Table("two views", "µs per image", "times lightly's speed", title=f"{size} px from {width} x {height}")
        for name, values in times.items():
            ratio = statistics.median(base / value for base, value in zip(times[PEER], values, strict=True))
            table.add_row(name, f"{statistics.median(values):.1f}", f"{ratio:.2f}")
            record.append({"size": size, "name": name, "microseconds": values, "ratio": ratio})
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "rounds": arguments.rounds, "rows": record}, indent=2))


if __name__ == "__main__":
    main()
