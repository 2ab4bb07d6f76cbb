"""One bar for the whole run: step, loss, kNN, time left."""

import sys

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sslzoo.downstream.base import Evaluate
from sslzoo.method import Method
from sslzoo.monitor import Metrics, Watch

console = Console(stderr=True, soft_wrap=True)


class Bar(pl.Callback):
    """Progress with loss, accuracy and time left; where the output is no terminal, a line an epoch.

    Args:
        metrics: knows loss and speed.
        watch: knows accuracy, in its ``values``.
        shown: what accuracy is called here, and there.
    """

    def __init__(self, metrics: Metrics, watch: Watch | Evaluate, shown: tuple[str, str] = ("kNN", "knn_top1")):
        self.metrics, self.watch = metrics, watch
        self.name, self.key = shown
        self.live = sys.stderr.isatty()
        self.bar: Progress | None = None

    def on_train_start(self, trainer, method: Method) -> None:
        if not (self.live and trainer.is_global_zero):
            return
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"loss {{task.fields[loss]}}  {self.name} {{task.fields[score]}}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task(
            "", total=trainer.estimated_stepping_batches, completed=trainer.global_step, **self._fields(trainer)
        )
        self.bar.start()

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx) -> None:
        if self.bar:
            self.bar.update(self.task, completed=trainer.global_step, **self._fields(trainer))

    def on_train_epoch_end(self, trainer, method: Method) -> None:
        if self.live or not trainer.is_global_zero:
            return
        fields = self._fields(trainer)
        left = self.metrics.seconds * (method.steps / max(1, trainer.global_step) - 1)
        console.print(
            f"epoch {fields['epoch']}  step {trainer.global_step}/{method.steps}  loss {fields['loss']}"
            f"  {self.name} {fields['score']}  {self.metrics.images_per_second:.0f} images/s  {left:.0f} s left"
        )

    def _fields(self, trainer) -> dict[str, str]:
        score = self.watch.values.get(self.key)
        return {
            "epoch": str(trainer.current_epoch + 1),
            "loss": f"{self.metrics.loss:.3f}",
            "score": "-" if score is None else f"{100 * score:.1f} %",
        }

    def teardown(self, trainer, method, stage) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer, method, exception) -> None:
        self.teardown(trainer, method, None)  # Lightning does not: the cursor would stay hidden
