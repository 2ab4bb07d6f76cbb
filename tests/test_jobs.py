"""Runs beside each other: how many, in what order, what their end is, and that a signal reaches them."""

import os
import signal
import sys
import threading
import time

import pytest

from sslzoo.config import composed
from sslzoo.errors import UserError
from sslzoo.monitor import Stopped
from sslzoo.tasks import jobs
from sslzoo.tasks.jobs import devices, side_by_side, together

SCRIPT = """
import os, pathlib, signal, sys, time
name, seconds, code, folder = sys.argv[1:]
def stop(number, frame):
    pathlib.Path(folder, name + ".stopped").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
here = pathlib.Path(folder, name + ".running")
here.touch()
print("threads", os.environ.get("OMP_NUM_THREADS"), "gpus", os.environ.get("CUDA_VISIBLE_DEVICES"))
pathlib.Path(folder, name + ".beside").write_text(str(len(list(pathlib.Path(folder).glob("*.running")))))
time.sleep(float(seconds))
here.unlink()
print("sslzoo: last words of", name)
sys.exit(int(code))
"""


@pytest.fixture(autouse=True)
def _scripts_for_runs(tmp_path, monkeypatch):
    """``python -m sslzoo NAME SECONDS CODE`` is a small script."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    real = jobs.subprocess.Popen

    def started(words, **options):
        assert words[:3] == [sys.executable, "-m", "sslzoo"]
        return real([sys.executable, str(script), *words[3:], str(tmp_path)], **options)

    monkeypatch.setattr(jobs.subprocess, "Popen", started)


def test_all_run_no_more_than_asked_for_at_a_time_with_one_thread_each(tmp_path):
    commands = {f"run{k}": [f"run{k}", "0.3", "0"] for k in range(5)}
    seen = []
    assert together(commands, tmp_path / "logs", jobs=2, tick=lambda codes: seen.append(dict(codes)), every=0.05) == {}
    assert seen[-1] == dict.fromkeys(commands, 0)
    assert max(list(codes.values()).count(None) for codes in seen) <= 2
    assert max(int((tmp_path / f"run{k}.beside").read_text()) for k in range(5)) == 2
    assert (tmp_path / "logs" / "run3.txt").read_text().splitlines() == [
        "threads 1 gpus None",
        "sslzoo: last words of run3",
    ]


@pytest.mark.parametrize(("visible", "gpus"), [(None, ["0", "1"]), ("4,6", ["4", "6"])])
def test_runs_beside_each_other_have_a_gpu_each_and_hand_it_on(tmp_path, monkeypatch, visible, gpus):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    commands = {"long": ["long", "1.0", "0"], **{f"run{k}": [f"run{k}", "0.1", "0"] for k in range(3)}}
    assert together(commands, tmp_path / "logs", jobs=2, every=0.05) == {}
    had = {name: (tmp_path / "logs" / f"{name}.txt").read_text().splitlines()[0].split()[-1] for name in commands}
    assert had == {"long": gpus[0], "run0": gpus[1], "run1": gpus[1], "run2": gpus[1]}


def test_one_that_fails_is_told_by_its_last_line_and_the_others_go_on(tmp_path):
    commands = {"bad": ["bad", "0", "2"], "good": ["good", "0", "0"]}
    assert together(commands, tmp_path / "logs") == {"bad": "sslzoo: last words of bad"}
    assert "last words of good" in (tmp_path / "logs" / "good.txt").read_text()
    with pytest.raises(UserError, match=r"^last words of bad"):
        together({"bad": commands["bad"]}, tmp_path / "logs")


def test_a_signal_is_passed_on_and_waited_for(tmp_path):
    def interrupt():
        while not (tmp_path / "long.beside").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt).start()
    with pytest.raises(Stopped) as stopped:
        together({"long": ["long", "60", "0"], "never": ["never", "0", "0"]}, tmp_path / "logs", every=0.1)
    assert stopped.value.code == 143
    assert (tmp_path / "long.stopped").exists()
    assert not (tmp_path / "never.beside").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_how_many_devices_a_run_takes(monkeypatch):
    def taken(said, *more):
        return devices(composed(["task=selftrain", f"trainer.devices={said}", *more]))

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [taken(said) for said in (1, 2, "auto", "[1]", "[0,2]", "-1")] == [1, 2, 1, 1, 2, 1]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [taken(said) for said in (1, "auto", "-1", "[1]")] == [1, 4, 4, 1]
    assert taken("auto", "trainer.accelerator=cpu") == 1


@pytest.mark.parametrize(("gigabytes", "cores", "jobs"), [(64, 4, 4), (6, 4, 2), (1, 4, 1), (64, 1, 1)])
def test_as_many_runs_go_side_by_side_as_cores_and_free_memory_allow(tmp_path, monkeypatch, gigabytes, cores, jobs):
    told = tmp_path / "meminfo"
    told.write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {gigabytes * 2**20} kB\n")
    monkeypatch.setattr("sslzoo.tasks.jobs.MEMINFO", told)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert side_by_side(None) == jobs
    assert side_by_side(7) == 7
