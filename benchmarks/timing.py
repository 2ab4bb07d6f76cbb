"""What the benchmarks share: a clock of CPU and wall time, turns in a new order each round, the facts of a run."""

import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """CPU time of all threads of this process, and the time on the wall."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.process_time(), time.perf_counter())

    def since(self, start: "Seconds", laps: int = 1) -> "Seconds":
        return Seconds((self.cpu - start.cpu) / laps, (self.wall - start.wall) / laps)


def interleaved(rows: dict[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """What each row measured in each round; the rows take turns, in a new order each round."""
    times: dict[str, list[Seconds]] = {name: [] for name in rows}
    names = list(rows)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            times[name].append(rows[name]())
    return times


def ratio(above: list[Seconds], below: list[Seconds]) -> Seconds:
    """The median over rounds of ``above / below``."""
    pairs = list(zip(above, below, strict=True))
    return Seconds(
        statistics.median(a.cpu / b.cpu for a, b in pairs), statistics.median(a.wall / b.wall for a, b in pairs)
    )


def median(times: list[Seconds]) -> Seconds:
    return Seconds(statistics.median(t.cpu for t in times), statistics.median(t.wall for t in times))


def commit() -> str:
    """The checkout's commit, with a ``+`` where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def header(packages: list[str]) -> dict[str, str]:
    """Commit, versions of those ``packages`` that are installed, and the machine as it is now."""
    known = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in packages if name in known}
    cpus, load = os.cpu_count(), os.getloadavg()[0]
    machine = f"{cpus} ({torch.backends.cpu.get_cpu_capability()}), load {load:.1f}"
    threads = str(torch.get_num_threads())
    return {"commit": commit(), **versions, "python": platform.python_version(), "threads": threads, "cpus": machine}
