"""What all runs of self-training have in common, whatever is labelled."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from runs import checkpoint_of, killed_before
from sslzoo.__main__ import run
from sslzoo.data.mixed import MixedBatch
from sslzoo.dist import all_mean
from sslzoo.moving_teacher import TaughtStudent

PARTS = ("teacher", "student", "control")


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def assert_parts(run_dir: Path, summary: dict, score: str, steps: int, images: int, part_score: str = "") -> None:
    """Teacher and student took ``steps``, the teacher ``images``, student and control twice as many, from one start.

    Args:
        score: its name in the whole run's summary; in the parts' it is ``part_score``, or the same.
    """
    assert summary == summary_of(run_dir)
    parts = {name: summary_of(run_dir / name) for name in PARTS}
    assert [part["steps"] for part in parts.values()] == [steps, steps, 2 * steps]
    assert [part["images_seen"] for part in parts.values()] == [images, 2 * images, 2 * images]
    assert len({part["start"] for part in parts.values()}) == 1
    of = {name: part[part_score or score] for name, part in parts.items()}
    assert summary[score] == summary["student"][score] == of["student"]
    assert (summary["supervised"][score], summary["control"][score]) == (of["teacher"], of["control"])
    assert summary["gain_at_equal_steps"] == of["student"] - of["teacher"]
    assert summary["gain_at_equal_images"] == of["student"] - of["control"]
    student, teacher = (checkpoint_of(run_dir / name)["state_dict"] for name in ("student", "teacher"))
    assert any(not torch.equal(value, student[f"learner.{name}"]) for name, value in teacher.items())
    assert student["balance.means"].gt(0).all()


def assert_resumes(
    words: Sequence[str], finished: tuple[Path, dict], run_dir: Path, part: str, step: int, score: str
) -> None:
    """A run killed before ``step`` of ``part``, and resumed, is ``finished``, and trained no part twice."""
    unbroken, summary = finished
    with killed_before(step, run_dir / part):
        run([*words, f"run_dir={run_dir}"])
    assert not (run_dir / "control").exists()
    teacher = (run_dir / "teacher" / "last.ckpt").stat().st_mtime_ns
    resumed = run([f"resume={run_dir}"])
    assert part == "teacher" or (run_dir / "teacher" / "last.ckpt").stat().st_mtime_ns == teacher
    for name in PARTS:
        one, other = (checkpoint_of(path / name)["state_dict"] for path in (unbroken, run_dir))
        assert all(torch.equal(value, other[key]) for key, value in one.items()), name
    for key in (score, "gain_at_equal_steps", "gain_at_equal_images", "pseudo"):
        assert resumed[key] == summary[key], key


def taught_steps(module: TaughtStudent, batches: Sequence[MixedBatch], lr: float = 0.1) -> dict[str, Tensor]:
    """The state after steps as the trainer takes them, gradients averaged over ranks."""
    learned = [p for p in module.learner.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=lr)
    for step, batch in enumerate(batches):
        module.step = step
        optimizer.zero_grad()
        module.loss(batch).backward()
        for p in learned:
            p.grad = None if p.grad is None else all_mean(p.grad)
        optimizer.step()
        module.after_step()
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
