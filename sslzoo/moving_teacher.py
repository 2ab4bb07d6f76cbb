"""A teacher that is the moving average of its student: Unbiased Teacher (Liu et al. 2021, arXiv 2102.09480).

After a burn-in on human labels (sec. 3.1) the average of all the student's weights labels the images of every step anew
(sec. 3.2): it sees a view as it is, the student learns its boxes from the same view distorted. Here the two losses are
weighed by ``selftrain.LossBalance``, where the paper has a constant 4; the boxes' places are learned as well as their
classes, of which the paper learns the latter; images in which the teacher is sure of nothing teach nothing; the burn-in
is a part of the run, in the paper 2,000 steps; and it is the student that is scored.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sslzoo.blocks import EMA
from sslzoo.data.box_module import BoxBatch
from sslzoo.data.mixed import MixedBatch
from sslzoo.dist import all_mean
from sslzoo.downstream.detection import Detection, unit_range
from sslzoo.downstream.detectors import losses_of
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import log
from sslzoo.selftrain import MATCH_DENSITY, LossBalance


@dataclass(frozen=True)
class Moving:
    """How a teacher follows its student, and what it is sure of.

    Args:
        decay: share of the teacher that a step leaves as it is.
        burn_in: share of the run in which only human labels are learned from, and the teacher is the student itself.
        threshold: boxes of this score or more are learned from; the paper 0.7.

    Raises:
        UserError: on a value that is none.
    """

    decay: float = 0.9996
    burn_in: float = 0.25
    threshold: float = 0.5

    def __post_init__(self):
        for name, example in (("decay", 0.9996), ("burn_in", 0.25)):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise UserError(f"task.teacher.{name}={value} is no number from 0 to below 1; set it to e.g. {example}")
        if self.threshold == MATCH_DENSITY:
            raise UserError(
                f"task.teacher.threshold={MATCH_DENSITY} needs the scores of a whole set, but a moving teacher labels"
                " a batch at a time; give a score from 0 to 1, e.g. 0.5"
            )
        if not (_is_number(self.threshold) and 0 <= self.threshold <= 1):
            raise UserError(f"task.teacher.threshold={self.threshold} is no score from 0 to 1; set it to e.g. 0.5")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class MovingTeacher(nn.Module):
    """A frozen copy of a detector that follows it, statistics of BatchNorm included, and labels images.

    Args:
        detector: the student's, from ``detectors.build``; copied as it is now.
        moving: its settings.

    Attributes:
        found: moving means of boxes and of images a step and rank, ``(2,)`` float32; in the checkpoint. Both begin at
            zero and move together, so that what they still lack cancels in their ratio.
    """

    SMALLEST = 2.0  # pixels; narrower and lower boxes are dropped, as ``selftrain.select`` does
    MEMORY = 0.99  # of the means, about a hundred steps

    def __init__(self, detector: nn.Module, moving: Moving):
        super().__init__()
        self.moving, self.average = moving, EMA(detector)
        self.found: Tensor
        self.register_buffer("found", torch.zeros(2))
        self.eval()

    def train(self, mode: bool = True) -> "MovingTeacher":
        """It stays in eval mode: its BatchNorm has the student's statistics, and it finds instead of learning."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What it is sure of in each image ``(3, H, W)`` uint8: ``boxes`` (n, 4), ``labels`` (n,); all ranks together.

        Overlapping boxes are gone already, by the detector's own suppression.
        """
        targets = []
        for found in self.average([unit_range(image) for image in images]):
            sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
            kept = (found["scores"] >= self.moving.threshold) & (sides >= self.SMALLEST).all(1)
            targets.append({name: found[name][kept] for name in ("boxes", "labels")})
        now = [sum(len(target["labels"]) for target in targets), len(targets)]
        self.found.lerp_(all_mean(self.found.new_tensor(now)), 1 - self.MEMORY)
        return targets

    @torch.no_grad()
    def follow(self, detector: nn.Module, decay: float) -> None:
        """``average <- decay * average + (1 - decay) * detector``, parameters and buffers; whole numbers are copied."""
        pairs = [*zip(self.average.parameters(), detector.parameters(), strict=True)]
        pairs += zip(self.average.buffers(), detector.buffers(), strict=True)
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*averaged, strict=True)), 1 - decay)
        for own, others in pairs:
            if not own.is_floating_point():
                own.copy_(others)

    def boxes_per_image(self) -> float | None:
        """Boxes that were learned from, an image, over the last hundred steps or so; None before there was one."""
        boxes, images = self.found.tolist()
        return boxes / images if images else None

    def told(self) -> dict:
        """What a summary says of it."""
        return {**asdict(self.moving), "boxes_per_image": self.boxes_per_image()}


class TaughtStudent(Method):
    """A detector that learns from people, and after the burn-in from its own moving average as well.

    Each half of a batch is one forward pass, as of a ``selftrain.Student``.

    Args:
        learner: what learns; its optimizer, clipping and norms are the student's.
        balance: weighs the halves, from the end of the burn-in on.
        teacher: a copy of ``learner.detector``.
    """

    def __init__(self, learner: Detection, balance: LossBalance, teacher: MovingTeacher):
        super().__init__(learner.encoder, learner.optim)
        self.learner, self.balance, self.teacher = learner, balance, teacher
        self.sync_batchnorm, self.settings, self.seed = learner.sync_batchnorm, learner.settings, learner.seed

    def forward(self, x):
        """What the learner says of ``x``."""
        return self.learner(x)

    @property
    def burns_in(self) -> bool:
        """Whether only human labels are learned from in this step."""
        return self.progress < self.teacher.moving.burn_in

    def loss(self, batch: MixedBatch) -> Tensor:
        human = self.learner.loss(batch.human)
        return human if self.burns_in else self.balance(human, self.pseudo_loss(batch.pseudo))

    def pseudo_loss(self, batch: BoxBatch) -> Tensor:
        """The loss of images, by what the teacher finds in their ``clean`` views.

        Those in which it is sure of nothing do not count: as background they would teach to overlook what it overlooks.
        """
        targets = self.teacher([target["clean"] for target in batch.targets])
        counted = [i for i, target in enumerate(targets) if len(target["labels"])]
        # A rank where nothing is found takes part by a zero: the others wait for its collectives and its gradients.
        pictures = [unit_range(image) for image in batch.images]
        losses = losses_of(self.learner.detector, pictures, targets, counted or [0])
        return torch.stack(list(losses.values())).sum() * bool(counted)

    def before_step(self) -> None:
        self.learner.before_step()

    def after_step(self) -> None:
        self.learner.after_step()
        self.teacher.follow(self.learner.detector, 0.0 if self.burns_in else self.teacher.moving.decay)

    def parameter_groups(self) -> list[dict]:
        return self.learner.parameter_groups()

    def on_train_epoch_end(self) -> None:
        found = self.teacher.boxes_per_image()
        if found is not None:
            log(self.trainer, {"pseudo_boxes": found})
