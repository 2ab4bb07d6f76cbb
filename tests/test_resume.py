"""A run that was broken off and resumed ends with the weights of an unbroken one, to the bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from runs import assert_same_run, checkpoint_of, killed_before
from sslzoo.__main__ import main, run
from sslzoo.method import Method
from sslzoo.report.csv_log import read_rows

SMALL = [
    "data.train_size=160",
    "data.val_size=32",
    "data.batch_size=32",
    "data.workers=1",
    "method.queue_size=64",
    "method.bn_groups=2",
    "encoder.name=resnet10t",
    "encoder.width=0.125",
    "image_size=16",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "monitor.k=5",
    "monitor.log_every=1",
]
STEPS = 15


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    run([*SMALL, f"run_dir={run_dir}"])
    return run_dir


@pytest.mark.parametrize(
    ("killed_after", "checkpoint_every"), [(2, 100), (3, 2), (5, 100), (5, 5), (6, 100), (9, 4), (14, 7)]
)
def test_killed_and_resumed_equals_unbroken(tmp_path, unbroken, killed_after, checkpoint_every):
    run_dir = tmp_path / "broken"
    with killed_before(killed_after):
        run([*SMALL, f"run_dir={run_dir}", f"checkpoint.steps={checkpoint_every}"])
    assert not (run_dir / "summary.json").exists()
    run([f"resume={run_dir}"])
    assert_same_run(unbroken, run_dir, STEPS)


def test_a_run_of_so_many_steps_killed_after_an_epoch_goes_on_in_the_next(tmp_path, monkeypatch):
    words = [*SMALL, "trainer.max_epochs=-1", "trainer.max_steps=13", "monitor.every_epochs=2"]
    run([*words, f"run_dir={tmp_path / 'unbroken'}"])
    with killed_before(5):
        run([*words, f"run_dir={tmp_path / 'broken'}"])
    forward, steps = Method.training_step, []

    def step(self, batch, batch_idx):
        steps.append((self.trainer.current_epoch, batch_idx))
        return forward(self, batch, batch_idx)

    monkeypatch.setattr(Method, "training_step", step)
    run([f"resume={tmp_path / 'broken'}"])
    assert steps == [(step // 5, step % 5) for step in range(5, 13)]
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken", 13)


@pytest.mark.parametrize("deaths", [(4, 7), (2, 6), (4, 6, 9, 11), (7, 8), (1, 13)])
def test_killed_several_times_equals_unbroken(tmp_path, unbroken, deaths):
    run_dir = tmp_path / "broken"
    for life, death in enumerate(deaths):
        with killed_before(death):
            run([f"resume={run_dir}"] if life else [*SMALL, f"run_dir={run_dir}", "checkpoint.steps=3"])
    run([f"resume={run_dir}"])
    assert_same_run(unbroken, run_dir, STEPS)


@pytest.mark.slow
def test_sigterm_then_sigkill_then_resume_equals_unbroken(tmp_path, unbroken):
    run_dir = tmp_path / "signalled"
    command = [sys.executable, "-m", "sslzoo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(arguments, rows):
        process = subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (run_dir / "metrics.csv").exists() and len(read_rows(run_dir / "metrics.csv")) >= rows:
                return process
            time.sleep(0.005)
        raise AssertionError(process.communicate()[1])

    process = start([*SMALL, f"run_dir={run_dir}"], rows=2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "resume=" in process.stderr.read()
    stopped_at = checkpoint_of(run_dir)["global_step"]
    assert 0 < stopped_at < STEPS
    process = start([f"resume={run_dir}"], rows=stopped_at + 3)
    process.kill()
    process.wait(60)
    subprocess.run([*command, f"resume={run_dir}"], env=environment, check=True, timeout=120)
    assert_same_run(unbroken, run_dir, STEPS)


def complaint(capsys, *arguments):
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("method=moco_v2", "recipe=moco"),
        ("encoder.name=resnet50", "encoder.name=resnet10t"),
        ("optim.lr=1", "optim.lr="),
    ],
)
def test_resume_as_another_run_is_refused(capsys, unbroken, override, told):
    assert told in complaint(capsys, f"resume={unbroken}", override)


def test_resume_of_nothing_is_refused(capsys, tmp_path):
    assert "is no run" in complaint(capsys, f"resume={tmp_path / 'nowhere'}")
    assert "is no run" in complaint(capsys, f"resume={tmp_path}")


def copy_of(run_dir, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.yaml", "command.txt"):
        (copy / name).write_bytes((run_dir / name).read_bytes())
    return copy


def test_a_checkpoint_that_is_none_is_refused(capsys, tmp_path, unbroken):
    copy = copy_of(unbroken, tmp_path)
    (copy / "last.ckpt").write_bytes(b"not a checkpoint")
    assert "is no checkpoint" in complaint(capsys, f"resume={copy}")


class Stranger:
    pass


def test_a_checkpoint_that_holds_code_is_refused(capsys, tmp_path, unbroken):
    copy = copy_of(unbroken, tmp_path)
    torch.save({"state_dict": {}, "stranger": Stranger()}, copy / "last.ckpt")
    assert "more than tensors and plain values" in complaint(capsys, f"resume={copy}")


def test_a_checkpoint_of_other_weights_is_refused(capsys, tmp_path, unbroken):
    copy = copy_of(unbroken, tmp_path)
    state = checkpoint_of(unbroken)
    state["state_dict"]["queue.keys"] = state["state_dict"]["queue.keys"][:10]
    torch.save(state, copy / "last.ckpt")
    assert "queue.keys" in complaint(capsys, f"resume={copy}")
