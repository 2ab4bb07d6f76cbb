"""Joint training: a network learns to find objects and, from other images and at once, to name classes.

Zoph et al. 2020, "Rethinking Pre-training and Self-training", arXiv 2006.06882, table 7: ImageNet's classification loss
beside COCO's detection loss, with and without self-training.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslzoo.blocks.norm import running_statistics_kept
from sslzoo.data.mixed import JointBatch
from sslzoo.downstream.finetune import classifier
from sslzoo.losses import full
from sslzoo.method import Method


class Joint(Method):
    """A learner whose encoder is taught classes beside.

    ``L = L_learner + weight * cross entropy``, of a linear classifier on the encoder's pooled features. The classified
    images are another domain at another size: BatchNorm normalises them by their own batch, and its running
    statistics, which predictions use, stay the learner's alone.

    Weights of the encoder that the learner leaves out stay as they are. Such is the last norm of a ViT, before pooled
    features only: the classifier can do all that its scale and shift could.

    Args:
        learner: ``Detection``, or a ``Student`` of it; its optimizer and norms are this one's.
        classes: C.
        weight: of the cross entropy.
        clip: largest norm of all gradients, the classifier's among them; None leaves them to the learner.

    Attributes:
        class_loss: the cross entropy of the last step on this rank; in the checkpoint.
    """

    def __init__(self, learner: Method, classes: int, weight: float = 1.0, clip: float | None = None):
        super().__init__(learner.encoder, learner.optim)
        self.learner, self.weight, self.clip = learner, weight, clip
        self.sync_batchnorm, self.settings, self.seed = learner.sync_batchnorm, learner.settings, learner.seed
        self.classifier = classifier(learner.encoder.dim, classes)
        self.class_loss: Tensor
        self.register_buffer("class_loss", torch.zeros(()))

    def loss(self, batch: JointBatch) -> Tensor:
        """What the learner takes, and one view ``(B', 3, H, W)`` of classified images with their classes ``(B',)``."""
        self.learner.step, self.learner.steps, self.learner.epochs = self.step, self.steps, self.epochs
        loss = self.learner.loss(batch.first)  # first: what it draws is what it would draw alone
        (x,) = batch.classified.views
        with running_statistics_kept(self.encoder):
            h = self.encoder(x)  # (B', D)
        class_loss = cross_entropy(full(self.classifier(h)), batch.classified.label)
        self.class_loss.copy_(class_loss.detach())
        return loss + self.weight * class_loss

    def before_step(self) -> None:
        if self.clip is not None:  # one norm over all; the learner's own clip then finds nothing too long
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        self.learner.before_step()

    def after_step(self) -> None:
        self.learner.after_step()

    def on_train_epoch_end(self) -> None:
        self.learner.on_train_epoch_end()

    def parameter_groups(self) -> list[dict]:
        return self.learner.parameter_groups() + self.optim.groups(self.classifier.parameters())
