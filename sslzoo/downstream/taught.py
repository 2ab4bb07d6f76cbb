"""What a moving teacher labels, and how its student learns from that: boxes and masks, pixels, images.

The mechanism is ``sslzoo.moving_teacher``. Unbiased Teacher labels boxes and learns their classes alone, here their
places are learned as well; for pixels and images it is Mean Teacher (Tarvainen and Valpola 2017, arXiv 1703.01780) with
the confidence filter of FixMatch (Sohn et al. 2020, arXiv 2001.07685).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslzoo.checkpoints.classifier import Tuned
from sslzoo.data.box_module import BoxBatch
from sslzoo.data.box_set import IGNORE
from sslzoo.dist import all_sum, world
from sslzoo.downstream.detection import Detection, unit_range
from sslzoo.downstream.detectors import losses_of
from sslzoo.downstream.finetune import Finetune
from sslzoo.downstream.segmentation import Segmentation, class_map
from sslzoo.losses import full
from sslzoo.method import Batch
from sslzoo.moving_teacher import Moving, TaughtStudent
from sslzoo.selftrain import LossBalance


class TaughtDetection(TaughtStudent):
    """A detector that learns the boxes, and perhaps the masks, that its teacher finds.

    The pseudo half of a batch holds the views of ``box_module.twin_example``.
    """

    FOUND = "pseudo_boxes"  # an image
    SMALLEST = 2.0  # pixels; narrower and lower boxes are dropped, as ``selftrain.select`` does
    learner: Detection

    @property
    def followed(self) -> tuple[nn.Module, ...]:
        return (self.learner.detector,)

    @torch.no_grad()
    def found_in(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What the teacher is sure of in images ``(3, H, W)`` uint8: targets as ``detectors.build`` says.

        Overlapping boxes are gone already, by the detector's own suppression.
        """
        targets = []
        for found in self.teacher([unit_range(image) for image in images]):
            sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
            kept = (found["scores"] >= self.teacher.moving.threshold) & (sides >= self.SMALLEST).all(1)
            target = {name: found[name] for name in ("boxes", "labels")}
            if "masks" in found:
                target["masks"] = (found["masks"][:, 0] >= 0.5).byte()  # (n, H, W)
                kept &= (target["masks"] > 0).flatten(1).any(1)
            targets.append({name: value[kept] for name, value in target.items()})
        self.teacher.count(sum(len(target["labels"]) for target in targets), len(targets))
        return targets

    def pseudo_loss(self, batch: BoxBatch) -> Tensor:
        """Images in which the teacher is sure of nothing do not count.

        As background they would teach to overlook what it overlooks.
        """
        targets = self.found_in([target["clean"] for target in batch.targets])
        counted = [i for i, target in enumerate(targets) if len(target["labels"])]
        # A rank where nothing is found takes part by a zero: the others wait for its collectives and its gradients.
        pictures = [unit_range(image) for image in batch.images]
        losses = losses_of(self.learner.detector, pictures, targets, counted or [0])
        return torch.stack(list(losses.values())).sum() * bool(counted)


class TaughtSegmentation(TaughtStudent):
    """A segmenter that learns the class of every pixel that its teacher is sure of, at one scale.

    The pseudo half of a batch holds the views of ``map_module.map_twin_example``.
    """

    FOUND = "pseudo_pixels"  # share of those inside the images
    learner: Segmentation

    @property
    def followed(self) -> tuple[nn.Module, ...]:
        return (self.learner.segmenter,)

    @torch.no_grad()
    def drawn_of(self, clean: Tensor, outside: Tensor) -> Tensor:
        """The teacher's class maps of ``(B, 3, S, S)`` uint8: ``(B, S, S)`` uint8, 255 where unsure or ``outside``."""
        maps = class_map(full(self.teacher(unit_range(clean))).softmax(1), self.teacher.moving.threshold)
        maps = maps.masked_fill(outside, IGNORE)
        self.teacher.count((maps != IGNORE).sum(), (~outside).sum())
        return maps

    def pseudo_loss(self, batch: BoxBatch) -> Tensor:
        clean, outside = (torch.stack([target[name] for target in batch.targets]) for name in ("clean", "outside"))
        targets = [{"class_map": found} for found in self.drawn_of(clean, outside)]
        return self.learner.loss(BoxBatch(batch.images, targets, batch.index))


def followed(network: Finetune | Tuned) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The parts of a classifier that its moving teacher is a copy of."""
    return network.encoder, network.projector, network.classifier


class TaughtFinetune(TaughtStudent):
    """A classifier that learns the classes of the images whose class its teacher is sure of.

    The pseudo half of a batch holds the teacher's view and the student's.

    Args:
        learner, balance, moving: see ``TaughtStudent``.
        soft: learn from the teacher's probabilities; else from its most probable class.
    """

    FOUND = "pseudo_images"  # share of them
    learner: Finetune

    def __init__(self, learner: Finetune, balance: LossBalance, moving: Moving, soft: bool = True):
        super().__init__(learner, balance, moving)
        self.soft = soft

    @property
    def followed(self) -> tuple[nn.Module, ...]:
        return followed(self.learner)

    def pseudo_loss(self, batch: Batch) -> Tensor:
        """The mean over the images of all ranks whose most probable class reaches the threshold."""
        clean, view = batch.views
        said = full(self.teacher(clean)).softmax(1)  # (B, C)
        sure = said.amax(1) >= self.teacher.moving.threshold
        self.teacher.count(sure.sum(), len(sure))
        scores = full(self.learner(view))
        each = cross_entropy(scores, said.to(scores.dtype) if self.soft else said.argmax(1), reduction="none")
        return world() * (each * sure).sum() / all_sum(sure.sum()).clamp(min=1)
