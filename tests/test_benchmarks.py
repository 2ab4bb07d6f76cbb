"""Benchmarks run and print every row; how fast anything is, a busy machine cannot say."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAIRS = ("32 / 32", "bf16 / bf16", "auto / 32")


@pytest.fixture(scope="module")
def timing():
    spec = importlib.util.spec_from_file_location("timing", ROOT / "benchmarks" / "timing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_ratio_is_the_median_over_rounds_and_not_the_ratio_of_medians(timing):
    above = [timing.Seconds(2, 3), timing.Seconds(10, 9), timing.Seconds(8, 1)]
    below = [timing.Seconds(1, 1), timing.Seconds(10, 1), timing.Seconds(2, 1)]
    assert timing.ratio(above, below) == (2, 3)


def test_every_row_is_measured_once_a_round(timing):
    calls = []

    def row(name):
        return lambda: calls.append(name) or timing.Seconds(1, 1)

    times = timing.interleaved({"a": row("a"), "b": row("b")}, rounds=3)
    assert [len(values) for values in times.values()] == [3, 3]
    assert sorted(calls[:2]) == sorted(calls[2:4]) == sorted(calls[4:]) == ["a", "b"]


@pytest.mark.slow
def test_pretraining_benchmark_gives_every_ratio(tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, ROOT / "benchmarks" / "pretrain.py", "--quick", "--json", tmp_path / "out.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "torch", "lightly", "pytorch-lightning", "threads", "cpus"} <= set(record)
    assert record["torch"] == torch.__version__.partition("+")[0]
    assert [result["encoder"] for result in record["results"]] == ["resnet10t, width 0.25", "resnet18"]
    for result in record["results"]:
        rows = {row["row"]: row for row in result["ratios"]}
        assert sum("/ limit" in name for name in rows) == 2
        assert all(f"images/s, sslzoo / lightly, {pair}" in rows for pair in PAIRS)
        assert all(math.isfinite(row[clock]) and row[clock] > 0 for row in rows.values() for clock in ("cpu", "wall"))
        assert all(name in done.stdout for name in rows)
        assert len(result["seconds"]) == 6


def test_zoo_table_states_mean_and_deviation_over_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import zoo

    keys = ("knn_top1_raw_pixels", "knn_top1_random_init", "knn_top1", "seconds", "images_per_second", "peak_memory_mb")
    seeds = [
        dict(zip(keys, values, strict=True)) for values in ((0.4, 0.5, 0.6, 10, 99, 7), (0.4, 0.5, 0.8, 20, 101, 9))
    ]
    assert zoo.row("moco", seeds)[:5] == ["moco", "40.0 ± 0.0", "50.0 ± 0.0", "70.0 ± 14.1", "+20.0 ± 14.1"]
    assert zoo.row("moco", seeds[:1])[3:6] == ["60.0", "+10.0", "10"]
    assert zoo.row("moco", [])[1] == "failed"


@pytest.mark.slow
def test_knn_benchmark_finds_equal_accuracies_and_prints_every_row(tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sizes = ["--rounds", "1", "--queries", "64", "--bank", "1000", "--dim", "16", "--json", tmp_path / "out.json"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "knn.py", *sizes],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("accuracy equal") == 2
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert {f"{name}, {classes}" for name in ("lightly", "sslzoo") for classes in (100, 1000)} < set(rows)
    assert all(row["cpu"][0] > 0 for row in rows.values())


def test_linear_eval_states_intervals_and_puts_the_best_first(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import linear_eval

    def one(label, top1):
        knn = {"method": "moco", "knn_top1": 0.5, "knn_top1_interval": [0.4, 0.6], "seconds": 2}
        linear = {"linear_top1": top1, "linear_top1_interval": [top1 - 0.1, top1 + 0.1], "lr": 1e-3, "seconds": 3}
        return linear_eval.row(label, knn, linear)

    assert one("moco/0", 0.625) == ["moco/0", "moco", "50.0 [40.0, 60.0]", "62.5 [52.5, 72.5]", "0.001", "5"]
    lines = linear_eval.table([one("a", 0.2), one("b", 0.7), one("c", 0.1)]).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["b", "a", "c"]


def test_linear_eval_goes_on_where_it_stopped(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import linear_eval

    ran = []

    def task(overrides):
        ran.append(overrides[0])
        place = Path(overrides[-1].removeprefix("run_dir="))
        place.mkdir(parents=True)  # as of its own, and what is left of it is in the way of the next
        if len(ran) == 2:
            raise KeyboardInterrupt
        return {"task": overrides[0]}

    monkeypatch.setattr(linear_eval, "sslzoo", task)
    with pytest.raises(KeyboardInterrupt):
        linear_eval.evaluated("random", "random", tmp_path, ["seed=1"])
    for _ in range(2):
        linear_eval.evaluated("random", "random", tmp_path, ["seed=1"])
    assert ran == ["task=knn", "task=linear", "task=linear"]
    linear_eval.evaluated("random", "random", tmp_path, ["seed=2"])
    assert len(ran) == 5
