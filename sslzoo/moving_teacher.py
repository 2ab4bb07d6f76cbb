"""A teacher that is the moving average of its student: Unbiased Teacher (Liu et al. 2021, arXiv 2102.09480).

After a burn-in on human labels (sec. 3.1) the average of all the student's weights labels the images of every step anew
(sec. 3.2): it sees a view as it is, the student learns from the image distorted. Here the two losses are weighed by
``selftrain.LossBalance``, where the paper has a constant 4; the burn-in is a part of the run, in the paper 2,000 steps;
and it is the student that is scored. What is labelled, boxes, pixels or images, is said in ``downstream.taught``.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sslzoo.blocks import EMA
from sslzoo.data.mixed import MixedBatch
from sslzoo.dist import all_mean
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import log
from sslzoo.selftrain import MATCH_DENSITY, LossBalance, Student


@dataclass(frozen=True)
class Moving:
    """How a teacher follows its student, and what it is sure of.

    Args:
        decay: share of the teacher that a step leaves as it is.
        burn_in: share of the run in which only human labels are learned from, and the teacher is the student itself.
        threshold: boxes of this score or more are learned from, pixels and images of this probability; the paper 0.7.

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
                raise UserError(
                    f"a moving teacher's {name}={value} is no number from 0 to below 1; give e.g. {{{name}: {example}}}"
                )
        if self.threshold == MATCH_DENSITY:
            raise UserError(
                f"threshold={MATCH_DENSITY} needs the scores of a whole set, but a moving teacher labels a batch at a"
                " time; give it a score from 0 to 1, e.g. {threshold: 0.5}"
            )
        if not (_is_number(self.threshold) and 0 <= self.threshold <= 1):
            raise UserError(
                f"a moving teacher's threshold={self.threshold} is no score from 0 to 1; give e.g. {{threshold: 0.5}}"
            )

    @classmethod
    def asked(cls, teacher: object, pseudo: object) -> "Moving | None":
        """What ``task.teacher`` asks for; None where the labels of ``task.pseudo`` are learned from as they are.

        Raises:
            UserError: if it asks for what there is not, or there is nothing to label.
        """
        if teacher is None:
            return None
        known = [each.name for each in fields(cls)]
        if not isinstance(teacher, Mapping) or set(teacher) - set(known):
            raise UserError(
                f"teacher={teacher} is neither null nor settings of a moving teacher, {', '.join(known)}; give e.g."
                " {decay: 0.9996}"
            )
        if pseudo is None:
            raise UserError(f"task.teacher={teacher} has nothing to label; set task.pseudo, which names images")
        return cls(**teacher)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class MovingTeacher(nn.Module):
    """A frozen copy of a student that follows it, statistics of BatchNorm included.

    Args:
        moving: its settings.
        students: modules that run one after the other; copied as they are now.

    Attributes:
        found: moving means of what it was sure of and of what it was asked, a step and rank, ``(2,)`` float32; in the
            checkpoint. Both begin at zero and move together, so that what they still lack cancels in their ratio.
    """

    MEMORY = 0.99  # of the means, about a hundred steps

    def __init__(self, moving: Moving, *students: nn.Module):
        super().__init__()
        self.moving, self.average = moving, EMA(*students)
        self.found: Tensor
        self.register_buffer("found", torch.zeros(2))
        self.eval()

    def train(self, mode: bool = True) -> "MovingTeacher":
        """It stays in eval mode: its BatchNorm has the student's statistics, and it answers instead of learning."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x):
        """What the average says of ``x``."""
        return self.average(x)

    @torch.no_grad()
    def count(self, sure: Tensor | int, asked: Tensor | int) -> None:
        """Take note of what this rank's step was sure of, out of what it was asked; all ranks together."""
        now = torch.stack([torch.as_tensor(each).to(self.found) for each in (sure, asked)])
        self.found.lerp_(all_mean(now), 1 - self.MEMORY)

    @torch.no_grad()
    def follow(self, *students: nn.Module, decay: float) -> None:
        """``average <- decay * average + (1 - decay) * student``, parameters and buffers; whole numbers are copied."""
        pairs = [*zip(self.average.parameters(), _parameters(students), strict=True)]
        pairs += zip(self.average.buffers(), _buffers(students), strict=True)
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*averaged, strict=True)), 1 - decay)
        for own, others in pairs:
            if not own.is_floating_point():
                own.copy_(others)

    @property
    def share(self) -> float | None:
        """What it was sure of over what it was asked, in the last hundred steps or so; None before there was one."""
        sure, asked = self.found.tolist()
        return sure / asked if asked else None


def _parameters(modules: tuple[nn.Module, ...]) -> list[Tensor]:
    return [parameter for module in modules for parameter in module.parameters()]


def _buffers(modules: tuple[nn.Module, ...]) -> list[Tensor]:
    return [buffer for module in modules for buffer in module.buffers()]


class TaughtStudent(Student):
    """A learner that learns from people, and after the burn-in from its own moving average as well.

    Args:
        learner: what learns; its optimizer, clipping and norms are the student's.
        balance: weighs the halves of a batch, from the end of the burn-in on.
        moving: settings of the teacher.

    Attributes:
        FOUND: what summaries and ``metrics.csv`` call the teacher's ``share``.
    """

    FOUND: str

    def __init__(self, learner: Method, balance: LossBalance, moving: Moving):
        super().__init__(learner, balance)
        self.teacher = MovingTeacher(moving, *self.followed)

    @property
    @abstractmethod
    def followed(self) -> tuple[nn.Module, ...]:
        """What of the learner the teacher is a copy of."""

    @abstractmethod
    def pseudo_loss(self, batch: NamedTuple) -> Tensor:
        """The learner's loss of images by what the teacher is sure of in them; 0 on all ranks where that is nothing."""

    @property
    def burns_in(self) -> bool:
        """Whether only human labels are learned from in this step."""
        return self.progress < self.teacher.moving.burn_in

    def loss(self, batch: MixedBatch) -> Tensor:
        human = self.learner.loss(batch.human)
        return human if self.burns_in else self.balance(human, self.pseudo_loss(batch.pseudo))

    def after_step(self) -> None:
        super().after_step()
        self.teacher.follow(*self.followed, decay=0.0 if self.burns_in else self.teacher.moving.decay)

    def human_alone(self, steps: int, of_all: int) -> int:
        """Of the first ``steps`` of a run of ``of_all`` those that took only the human half of their batch."""
        end = math.ceil(self.teacher.moving.burn_in * of_all)
        if end and (end - 1) / of_all >= self.teacher.moving.burn_in:
            end -= 1  # the product was rounded up
        return min(steps, end)

    def told(self) -> dict:
        """What a summary says of the teacher."""
        return {**asdict(self.teacher.moving), self.FOUND: self.teacher.share}

    def on_train_epoch_end(self) -> None:
        if self.teacher.share is not None:
            log(self.trainer, {self.FOUND: self.teacher.share})
