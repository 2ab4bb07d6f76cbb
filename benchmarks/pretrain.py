"""Pretraining steps: how near they are to the encoder's own time, and how they compare with lightly's modules.

    python benchmarks/pretrain.py [--methods moco,simclr,byol,swav,dino] [--rounds 7] [--json out.json] [--quick]

One thread, photographs' patches of 32 pixels in memory, two encoders: that of ``scale=demo`` (ResNet-10-t, a quarter
of the width, 3x3 stem) and ResNet-18 with the stem for ImageNet. SwAV's and DINO's small crops have 24 pixels: of fewer
ResNet-18's last stage would see single pixels, whose gradients a CPU computes wrongly in bfloat16 (blocks/strides.py).

- *Limit*: what the encoder alone takes for the views of a step, in one batch a view and the same precision and
  memory layout: for MoCo, forward without a gradient on the keys' view, forward and backward on the queries'. A step
  does more: views, heads, loss, BatchNorm in groups, optimizer, EMA, memory.
- *lightly*: the method put together from lightly's modules, transform and loss, as its documentation shows it, with
  the same encoder, sizes and batch, its views made from PIL images by a plain ``DataLoader``. Both are trained by a
  ``Trainer`` of the same settings. Before anything is timed, both must give the same loss for the same weights, with
  BatchNorm in evaluation mode: over which images it takes its statistics is a matter of the recipe.

All run in one process, in a new order each round; a figure is the median over the rounds, a ratio the median of
the rounds' ratios. The clock runs from the end of a fit's first step to the end of its last. CPU time counts the
threads that make views; on a busy machine it is the fairer of the two.
"""

import argparse
import json
import logging
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    DINOTransform,
    MoCoV2Transform,
    SimCLRTransform,
    SwaVTransform,
)
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sslzoo.blocks import Encoder
from sslzoo.blocks.crops import by_resolution
from sslzoo.config import composed
from sslzoo.data.images import ImageSet
from sslzoo.data.module import Images, Loader
from sslzoo.method import Batch, Method
from sslzoo.monitor import Metrics
from sslzoo.tasks.pretrain import build_method
from sslzoo.tasks.runs import device, images
from timing import Seconds, header, interleaved, median, ratio

STEP_TARGET = 1.10  # a step over its limit
PRECISIONS = ("32-true", "bf16-mixed")
PAIRINGS = {  # ours (None: what auto is here), lightly's, and the speed-up to reach
    "32 / 32": ("32-true", "32-true", 1.3),
    "bf16 / bf16": ("bf16-mixed", "bf16-mixed", 1.3),
    "auto / 32": (None, "32-true", 1.8),
}
ENCODERS = {
    "resnet10t, width 0.25": ["encoder.name=resnet10t", "encoder.stem=small", "encoder.width=0.25"],
    "resnet18": ["encoder.name=resnet18", "encoder.stem=imagenet", "encoder.width=1.0"],
}


class Peer(pl.LightningModule, ABC):
    """A method made of lightly's parts.

    Args:
        net: the encoder's network, ``(B, 3, H, W) -> (B, D)``; modules are declared in the order ours declares its own.
        ours: the method here, for its sizes and constants.
    """

    def __init__(self, net: nn.Module, ours: Method):
        super().__init__()
        self.encoder = net
        self.optim = ours.optim

    @abstractmethod
    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        """The loss of ``[views, ...]``."""

    def follow(self, ours: Method) -> None:
        """Take over our weights, layer by layer in their order, and what else decides the loss.

        Where only one side has a bias it becomes zero, and both compute the same.
        """
        with torch.no_grad():
            for theirs, own in zip(layers(self), layers(ours), strict=True):
                for name in theirs.keys() | own.keys():
                    if name in theirs and name in own:
                        theirs[name].copy_(own[name])
                    else:
                        (theirs if name in theirs else own)[name].zero_()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.optim
        return torch.optim.SGD(
            self.parameters(), lr=optim.peak_lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )


def layers(module: nn.Module) -> list[dict[str, nn.Parameter]]:
    """The parameters of each part that has its own, by name."""
    each = (dict(part.named_parameters(recurse=False)) for part in module.modules())
    return [parameters for parameters in each if parameters]


class LightlySimCLR(Peer):
    def __init__(self, net: nn.Module, ours: Method):
        super().__init__(net, ours)
        width, dim = ours.encoder.dim, ours.projector[-1].num_features
        self.projector = SimCLRProjectionHead(width, width, dim)
        self.criterion = NTXentLoss(temperature=ours.temperature)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        z1, z2 = (self.projector(self.encoder(x).flatten(start_dim=1)) for x in batch[0])
        return self.criterion(z1, z2)


class LightlyMoCo(Peer):
    def __init__(self, net: nn.Module, ours: Method):
        super().__init__(net, ours)
        size, dim = ours.queue.keys.shape
        width = ours.encoder.dim
        self.projector = MoCoProjectionHead(width, width, dim)
        self.target, self.target_projector = deepcopy(net), deepcopy(self.projector)
        deactivate_requires_grad(self.target)
        deactivate_requires_grad(self.target_projector)
        self.criterion = NTXentLoss(temperature=ours.temperature, memory_bank_size=(size, dim))
        self.momentum = ours.momentum

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        update_momentum(self.encoder, self.target, m=self.momentum)
        update_momentum(self.projector, self.target_projector, m=self.momentum)
        x1, x2 = batch[0]
        q = self.projector(self.encoder(x1).flatten(start_dim=1))
        with torch.no_grad():
            k = self.target_projector(self.target(x2).flatten(start_dim=1))
        return self.criterion(q, k)

    def follow(self, ours: Method) -> None:
        super().follow(ours)
        self.criterion.memory_bank.bank = ours.queue.keys.clone()


class LightlyBYOL(Peer):
    def __init__(self, net: nn.Module, ours: Method):
        super().__init__(net, ours)
        hidden, dim = ours.projector[0].out_features, ours.projector[-1].out_features
        self.projector = BYOLProjectionHead(ours.encoder.dim, hidden, dim)
        self.predictor = BYOLPredictionHead(dim, hidden, dim)
        self.target, self.target_projector = deepcopy(net), deepcopy(self.projector)
        deactivate_requires_grad(self.target)
        deactivate_requires_grad(self.target_projector)
        self.criterion = NegativeCosineSimilarity()
        self.momentum = ours.momentum

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        update_momentum(self.encoder, self.target, m=self.momentum)
        update_momentum(self.projector, self.target_projector, m=self.momentum)
        p1, p2 = (self.predictor(self.projector(self.encoder(x).flatten(start_dim=1))) for x in batch[0])
        with torch.no_grad():
            z1, z2 = (self.target_projector(self.target(x).flatten(start_dim=1)) for x in batch[0])
        return 4 + 2 * (self.criterion(p1, z2) + self.criterion(p2, z1))  # squared distances, as in the paper


class LightlySwAV(Peer):
    def __init__(self, net: nn.Module, ours: Method):
        super().__init__(net, ours)
        hidden, dim = ours.projector[0].out_features, ours.projector[-1].out_features
        self.projector = SwaVProjectionHead(ours.encoder.dim, hidden, dim)
        self.prototypes = SwaVPrototypes(dim, len(ours.prototypes.weight))
        self.criterion = SwaVLoss(ours.temperature, ours.iterations, ours.epsilon)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        self.prototypes.normalize()
        z = (self.projector(self.encoder(x).flatten(start_dim=1)) for x in batch[0])
        scores = [self.prototypes(nn.functional.normalize(each, dim=1, p=2)) for each in z]
        return self.criterion(scores[:2], scores[2:])


class LightlyDINO(Peer):
    def __init__(self, net: nn.Module, ours: Method):
        super().__init__(net, ours)
        hidden, bottleneck = ours.projector.mlp[0].out_features, ours.projector.mlp[-1].out_features
        outputs, (cold, warm) = ours.center.shape[1], (ours.warmup_teacher_temperature, ours.teacher_temperature)
        self.projector = DINOProjectionHead(ours.encoder.dim, hidden, bottleneck, outputs)
        self.target, self.target_projector = (
            deepcopy(net),
            DINOProjectionHead(ours.encoder.dim, hidden, bottleneck, outputs),
        )
        deactivate_requires_grad(self.target)
        deactivate_requires_grad(self.target_projector)
        self.criterion = DINOLoss(outputs, cold, warm, 0, ours.student_temperature, ours.center_momentum)
        self.momentum = ours.momentum

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        update_momentum(self.encoder, self.target, m=self.momentum)
        update_momentum(self.projector, self.target_projector, m=self.momentum)
        with torch.no_grad():
            t = [self.target_projector(self.target(x).flatten(start_dim=1)) for x in batch[0][:2]]
        s = [self.projector(self.encoder(x).flatten(start_dim=1)) for x in batch[0]]
        return self.criterion(t, s, epoch=0)


@dataclass
class Pair:
    """One method, here and there.

    Args:
        recipe: what to type for ours.
        peer: the same from lightly's parts.
        transform: lightly's views, as ours.
        trained: views that go through the encoder with a gradient.
        watched: views that go through it without one, as through a target.
    """

    recipe: list[str]
    peer: type[Peer]
    transform: Callable
    trained: slice
    watched: slice


PAIRS = {
    "moco": Pair(
        recipe=["method=moco_v2", "views=moco_v2"],
        peer=LightlyMoCo,
        transform=MoCoV2Transform(input_size=32),
        trained=slice(0, 1),
        watched=slice(1, 2),
    ),
    "simclr": Pair(
        recipe=["method=simclr", "views=simclr", "optim.name=sgd"],
        peer=LightlySimCLR,
        transform=SimCLRTransform(input_size=32),
        trained=slice(0, 2),
        watched=slice(0, 0),
    ),
    "byol": Pair(
        recipe=["method=byol", "views=byol", "optim.name=sgd"],
        peer=LightlyBYOL,
        transform=BYOLTransform(BYOLView1Transform(input_size=32), BYOLView2Transform(input_size=32)),
        trained=slice(0, 2),
        watched=slice(0, 2),
    ),
    "swav": Pair(
        recipe=["method=swav", "views=swav", "local_size=24", "optim.name=sgd", "method.queue_size=0"],
        peer=LightlySwAV,
        transform=SwaVTransform(crop_sizes=(32, 24), crop_counts=(2, 6)),
        trained=slice(0, 8),
        watched=slice(0, 0),
    ),
    "dino": Pair(
        recipe=[
            *("method=dino", "views=dino", "local_size=24", "optim.name=sgd", "optim.final_weight_decay=null"),
            *("method.clip=0", "method.freeze_last_layer=0"),
        ],
        peer=LightlyDINO,
        transform=DINOTransform(global_crop_size=32, local_crop_size=24, n_local_views=8),
        trained=slice(0, 10),
        watched=slice(0, 2),
    ),
}


class Pictures(Dataset):
    """An image set as torchvision's are: ``(views, label)`` of a PIL image."""

    def __init__(self, images: ImageSet, transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[list[Tensor], int]:
        return self.transform(Image.fromarray(self.images.images[row])), int(self.images.labels[row])


class Clock(pl.Callback):
    """Seconds a step, from the end of a fit's first step to the end of its last.

    Our loader is then as many batches ahead as it was at the start: it has made as many as were trained on.
    """

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            self.start = Seconds.now()
        if trainer.global_step == trainer.max_steps:
            self.seconds = Seconds.now().since(self.start, trainer.max_steps - 1)


def fit(module: pl.LightningModule, data: Images | DataLoader, precision: str, steps: int) -> Seconds:
    """``1 + steps`` steps by Lightning."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_steps=1 + steps,
        callbacks=[Metrics(), clock] if isinstance(module, Method) else [clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return clock.seconds


def by_hand(method: Method, data: Images, precision: str, steps: int) -> Seconds:
    """The same in a loop of one's own."""
    loader = Loader(data.train, data.views, data.batch_size, workers=data.workers)
    optimizer = method.configure_optimizers()
    method.train()
    for method.step, batch in zip(range(1 + steps), loader, strict=False):
        if method.step == 1:
            start = Seconds.now()
        method.optim.set(optimizer, method.step, 1 + steps, len(loader))
        with autocast(precision):
            loss = method.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        method.before_step()
        optimizer.step()
        with torch.no_grad():
            method.after_step()
    return Seconds.now().since(start, steps)


def limit(encoder: Encoder, views: list[Tensor], pair: Pair, precision: str, steps: int) -> Seconds:
    """The encoder's part of a step: forward and backward on one part of the views, forward on the other."""
    encoder.train()
    for step in range(1 + steps):
        if step == 1:
            start = Seconds.now()
        with autocast(precision):
            if views[pair.watched]:  # first, while no activations are held: the faster order
                with torch.no_grad():
                    by_resolution(encoder, views[pair.watched])
            h = by_resolution(encoder, views[pair.trained])  # (V * B, D)
        h.backward(torch.ones_like(h))
        encoder.zero_grad()
    return Seconds.now().since(start, steps)


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def same_loss(ours: Method, theirs: Peer, views: list[Tensor]) -> float:
    """Relative difference between the losses of both sides on one batch, with the same weights.

    BatchNorm is in its evaluation mode: what it counts as a batch is where the two may differ.
    """
    theirs.follow(ours)
    ours.eval(), theirs.eval()
    rows = torch.arange(len(views[0]))
    with torch.enable_grad():
        a, b = ours.loss(Batch(views, rows, rows)).item(), theirs.training_step([views, rows], 0).item()
    ours.after_step()
    ours.train(), theirs.train()  # a Trainer leaves the mode as it is
    return abs(a - b) / abs(b)


def measure(pair: Pair, overrides: list[str], steps: int, rounds: int) -> tuple[dict[str, list[Seconds]], str]:
    """Seconds a step of every contestant in every round, and what precision ``auto`` stands for."""
    pl.seed_everything(0, verbose=False)
    config = composed(["scale=demo", "data.workers=1", *pair.recipe, *overrides])
    data, (_, auto) = images(config), device(config)
    method = build_method(config, data.train)
    encoder = Encoder(**method.encoder.config)
    peer = pair.peer(Encoder(**method.encoder.config).net.to(memory_format=torch.contiguous_format), method)
    pictures = DataLoader(Pictures(data.train, pair.transform), data.batch_size, shuffle=True, drop_last=True)
    views = Loader(data.train, data.views, data.batch_size).make(0, data.views.buffers(data.batch_size)).views

    difference = same_loss(method, peer, views)
    if difference > 1e-4:
        raise SystemExit(f"{config.recipe}: the loss differs by {difference:.1e} from lightly's; nothing to compare")
    rows: dict[str, Callable[[], Seconds]] = {
        f"limit, {auto}": lambda: limit(encoder, views, pair, auto, steps),
        f"hand loop, {auto}": lambda: by_hand(method, data, auto, steps),
    }
    for precision in PRECISIONS:
        rows[f"sslzoo, {precision}"] = lambda precision=precision: fit(method, data, precision, steps)
        rows[f"lightly, {precision}"] = lambda precision=precision: fit(peer, pictures, precision, steps)
    return interleaved(rows, rounds), auto


def compared(times: dict[str, list[Seconds]], auto: str) -> Iterator[dict]:
    """The claims, as rows: what over what, the ratio of CPU and of wall time, and the target."""
    for name, row in (("Trainer", f"sslzoo, {auto}"), ("hand loop", f"hand loop, {auto}")):
        value = ratio(times[row], times[f"limit, {auto}"])
        yield {"row": f"step in a {name} / limit, {auto}", "cpu": value.cpu, "wall": value.wall, "target": STEP_TARGET}
    for name, (ours, theirs, target) in PAIRINGS.items():
        value = ratio(times[f"lightly, {theirs}"], times[f"sslzoo, {ours or auto}"])
        yield {"row": f"images/s, sslzoo / lightly, {name}", "cpu": value.cpu, "wall": value.wall, "target": target}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="moco", help=f"of {','.join(PAIRS)}; default moco")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed in each round, after one that is not")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="only to see that it runs: a round of one step of 16 images"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps, arguments.batch = 1, 1, 16
    torch.set_num_threads(1)
    random.seed(0)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    console, record = Console(), []
    facts = header(["torch", "torchvision", "pytorch-lightning", "timm", "lightly", "numba", "pillow"])
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    for method in arguments.methods.split(","):
        for encoder, chosen in ENCODERS.items():
            overrides = [*chosen, f"data.batch_size={arguments.batch}"]
            times, auto = measure(PAIRS[method], overrides, arguments.steps, arguments.rounds)
            title = f"{method}, {encoder}, batch {arguments.batch}"
            speeds = Table("", "CPU ms a step", "wall ms", "images/s of CPU", title=title)
            for name, values in times.items():
                cpu, wall = median(values)
                speeds.add_row(name, f"{1e3 * cpu:.0f}", f"{1e3 * wall:.0f}", f"{arguments.batch / cpu:.0f}")
            ratios = Table("", "CPU", "wall", "target")
            rows = list(compared(times, auto))
            for row in rows:
                sign = "<" if "limit" in row["row"] else ">"
                ratios.add_row(row["row"], f"{row['cpu']:.2f}", f"{row['wall']:.2f}", f"{sign} {row['target']:.2f}")
            console.print(speeds, ratios)
            record.append({"method": method, "encoder": encoder, "ratios": rows})
            record[-1]["seconds"] = {name: [list(value) for value in values] for name, values in times.items()}
    if arguments.json:
        settings = {"rounds": arguments.rounds, "steps": arguments.steps, "batch": arguments.batch}
        arguments.json.write_text(json.dumps({**facts, **settings, "results": record}, indent=2))


if __name__ == "__main__":
    main()
