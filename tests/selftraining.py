"""What all runs of self-training have in common, whatever is labelled."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from runs import Killed, checkpoint_of, dies_in
from sslzoo.__main__ import run
from sslzoo.monitor import Metrics

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
    words: Sequence[str], finished: tuple[Path, dict], run_dir: Path, part: str, step: int, monkeypatch, score: str
) -> None:
    """A run killed before ``step`` of ``part``, and resumed, is ``finished``, and trained no part twice."""
    unbroken, summary = finished
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_train_batch_start", dies_in(run_dir / part, step))
        with pytest.raises(Killed):
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
