"""The bar: a line an epoch where there is no terminal, one live line where there is."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from runs import Pull, images, trainer
from sslzoo.monitor import Metrics, Probe, Watch
from sslzoo.report import progress
from sslzoo.report.progress import Bar


def run(epochs=3):
    data, metrics = images(), Metrics()
    watch = Watch(Probe(data, k=3), metrics, every=2)
    trainer(metrics, watch, Bar(metrics, watch), max_epochs=epochs).fit(Pull(), datamodule=data)
    return metrics, watch


def test_without_a_terminal_every_epoch_is_a_line_with_its_figures(capsys):
    metrics, watch = run()
    printed = capsys.readouterr()
    assert printed.out == ""
    pattern = r"epoch (\d)  step (\d+)/18  loss ([\d.]+)  kNN (-|[\d.]+ %)  (\d+) images/s  (\d+) s left"
    lines = [re.fullmatch(pattern, line).groups() for line in printed.err.strip().splitlines()]
    assert [line[:2] for line in lines] == [("1", "6"), ("2", "12"), ("3", "18")]
    assert lines[0][3] == "-"  # nothing measured yet
    assert lines[2][2:4] == (f"{metrics.loss:.3f}", f"{100 * watch.values['knn_top1']:.1f} %")
    assert lines[2][5] == "0"


@pytest.mark.parametrize(("step", "seconds", "left"), [(25, 10.0, 30), (75, 90.0, 30), (100, 50.0, 0)])
def test_time_left_is_what_the_steps_so_far_took_for_those_that_remain(capsys, step, seconds, left):
    metrics = Metrics()
    metrics.seconds = seconds
    seen = SimpleNamespace(is_global_zero=True, current_epoch=0, global_step=step)
    Bar(metrics, SimpleNamespace(values={})).on_train_epoch_end(seen, SimpleNamespace(steps=100))
    assert capsys.readouterr().err.strip().endswith(f" {left} s left")


def test_other_ranks_are_silent(capsys):
    bar = Bar(Metrics(), SimpleNamespace(values={}))
    seen = SimpleNamespace(is_global_zero=False)
    bar.on_train_start(seen, None)
    bar.on_train_epoch_end(seen, None)
    bar.live = True
    bar.on_train_start(seen, None)
    assert bar.bar is None
    assert capsys.readouterr().err == ""


def test_on_a_terminal_one_live_line_tells_the_same_and_is_put_away(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    metrics, _ = run()
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    last = shown.strip().splitlines()[-1]
    assert last.startswith("epoch 3")
    assert "18/18" in last
    assert f"loss {metrics.loss:.3f}" in last
    assert "images/s" not in shown
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") > 0  # the cursor is back


def test_a_run_that_fails_puts_the_live_line_away_too(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)

    class Failing(Pull):
        def loss(self, batch):
            raise RuntimeError("broken")

    data, metrics = images(), Metrics()
    bar = Bar(metrics, Watch(Probe(data, k=3), metrics))
    with pytest.raises(RuntimeError, match="broken"):
        trainer(bar).fit(Failing(), datamodule=data)
    assert bar.bar is None
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h")
