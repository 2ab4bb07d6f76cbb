"""When a task looks at its held-out images."""

from collections.abc import Callable

import pytorch_lightning as pl

from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import log


class Evaluate(pl.Callback):
    """A look at held-out images every few epochs, and at the end; what is found last is the run's score.

    Args:
        look: from the method to its scores by name, called on every rank; what is no number is not logged.
        every: epochs between two looks.

    Attributes:
        values: the scores; live in the checkpoint.

    Raises:
        UserError: if ``every`` is less than 1.
    """

    def __init__(self, look: Callable[[Method], dict], every: int = 1):
        if every < 1:
            raise UserError(f"task.every_epochs={every} is no number of epochs; set it to 1 or more")
        self.look, self.every = look, every
        self.values: dict = {}

    def state_dict(self) -> dict:
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.values = state["values"]

    def on_train_epoch_end(self, trainer, module: Method) -> None:
        if (trainer.current_epoch + 1) % self.every and trainer.global_step < module.steps:
            return
        self.values = self.look(module)
        log(trainer, {name: value for name, value in self.values.items() if isinstance(value, int | float)})
