"""Times two jobs in turn, and the peak memory of one in a process of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def in_turn(
    jobs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every job, A B A B …, after one warm-up of each.

    Args:
        jobs: what to time.
        repeats: rounds.
        clock: `time.process_time` counts the processor's seconds, which other work on the machine lengthens less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            start = clock()
            job()
            seconds[name].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float], digits: int = 1) -> str:
    """The median of the pairwise ratios with their range."""
    pairs = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return f"{statistics.median(pairs):.{digits}f}x (pairs {pairs[0]:.{digits}f} to {pairs[-1]:.{digits}f})"


def line(name: str, seconds: list[float], digits: int = 1) -> str:
    """Median and range in milliseconds."""
    ms = [1e3 * s for s in seconds]
    return f"  {name:<44} {statistics.median(ms):9.{digits}f} ms   ({min(ms):.{digits}f} to {max(ms):.{digits}f})"


def peak_growth(job: Callable[[], object]) -> int:
    """Peak memory above the present one while a job runs, in bytes (Linux); meaningful once a process."""
    before = _status("VmRSS")
    job()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of this process's status, in bytes. Unlike `getrusage`, its peak does not begin with the parent's."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(field):
            return int(entry.split()[1]) * 1024
    raise ValueError(f"expected a field {field} in /proc/self/status, got none; memory is measured on Linux only")


def in_fresh_process(script: str, *arguments: str) -> str:
    """The last line that a script prints when it is run by itself."""
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
