"""Runs beside each other, each a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, ListConfig

from sslzoo.errors import UserError
from sslzoo.monitor import Stopped

MEMINFO = Path("/proc/meminfo")
MEMORY_MB = 2500  # of one run among several; the built-in scenes take 1,500


def devices(config: DictConfig) -> int:
    """How many devices of a machine a run of ``config`` takes, by Lightning's rules for ``trainer.devices``."""
    said = config.trainer.devices
    if said in ("auto", -1, "-1"):
        return 1 if config.trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    if isinstance(said, ListConfig):
        return len(said)
    return len([each for each in said.split(",") if each]) if "," in str(said) else int(said)


def side_by_side(jobs: int | None) -> int:
    """``jobs``; for None as many runs as there are GPUs, or without any cores and free memory for, one at least."""
    if jobs is not None:
        return jobs
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    (line,) = (line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    return max(1, min(len(os.sched_getaffinity(0)), int(line.split()[1]) // 1024 // MEMORY_MB))


def together(
    commands: Mapping[str, Sequence[str]],
    logs: Path,
    jobs: int = 1,
    tick: Callable[[Mapping[str, int | None]], None] = lambda codes: None,
    every: float = 1.0,
) -> dict[str, str]:
    """Run ``python -m sslzoo`` with each of ``commands``, ``jobs`` at a time, in their order.

    Where there are several GPUs, runs that are beside each other have one each.

    SIGTERM and SIGINT are passed on, so that runs write their checkpoints; then ``Stopped`` is raised.

    Args:
        commands: name -> words.
        logs: folder of ``NAME.txt``, all that a run says; a later run's follows.
        jobs: how many at a time; with more than one each has one thread.
        tick: called every ``every`` seconds, and whenever a run has ended, with the exit codes of all that were
            started, None of those that go on.

    Returns:
        name -> the last line of its log, of the runs that failed.

    Raises:
        UserError: if the only run fails.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, codes, taken = list(commands), {}, {}, {}
    asked: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, lambda got, _: asked.append(got)) for number in numbers}
    slots = list(range(jobs))  # those that no run has
    try:
        while (waiting or running) and not asked:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                with (logs / f"{name}.txt").open("a") as log:
                    words = [sys.executable, "-m", "sslzoo", *commands[name]]
                    env = os.environ | (alone(slots[0]) if jobs > 1 else {})
                    running[name] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=env)
                taken[name], codes[name] = slots.pop(0), None
            ended = _wait(running, every, asked)
            for name in ended:
                codes[name] = running.pop(name).returncode
                slots.append(taken.pop(name))
            tick(codes)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if asked:
        raise Stopped(asked[0])
    failed = {name: _last_line(logs / f"{name}.txt") for name, code in codes.items() if code}
    if failed and len(commands) == 1:
        (name, line), *_ = failed.items()
        raise UserError(line.removeprefix("sslzoo: ") or f"{name} ended with code {codes[name]}")
    return failed


def alone(slot: int) -> dict[str, str]:
    """What the environment of a run says that has others beside it: one thread, and one of several GPUs."""
    count = torch.cuda.device_count()
    if count < 2:
        return {"OMP_NUM_THREADS": "1"}
    known = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": known[slot % count]}


def _wait(running: Mapping[str, subprocess.Popen], seconds: float, asked: Sequence[int]) -> list[str]:
    """The runs that ended within some seconds, or before a signal."""
    until = time.monotonic() + seconds
    while True:
        ended = [name for name, process in running.items() if process.poll() is not None]
        if ended or asked or time.monotonic() > until:
            return ended
        time.sleep(0.05)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
