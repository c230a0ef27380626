"""What reporting costs a training: ``Run.step`` and its channel, on a thread whose steps take 50 ms.

Two loops of the same work take turns, one that reports each step and one that does not. The listener is a process of
its own, as the supervisor is, and takes in every message. Three figures come of it, each as a share of the step: the
thread's own CPU time inside ``Run.step``, which other processes do not change; the time that passed there, which holds
waiting for a core where there are too few; and how much longer the median step is. Prints JSON.

    python -m bench.heartbeat [--seconds 60]
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from worker.channel import Channel
from worker.run import Assignment
from worker.runner import RunnerRun

STEP_SECONDS: Final = 0.05
_BLOCK: Final = 20
"""Steps of one kind in a row."""
_LISTEN: Final = """
import sys
from worker.channel import Channel
for message in Channel.from_fd(int(sys.argv[1])).messages():
    pass
"""


class Reporter:
    """Stands where the runner's process is: it has a channel, and no storage."""

    device = "cpu"

    def __init__(self, channel: Channel) -> None:
        self.channel = channel


def calibrate() -> Callable[[], None]:
    """Work on the CPU, in torch, that takes about ``STEP_SECONDS``."""
    a = torch.randn(256, 256)

    def multiply(times: int) -> None:
        x = a
        for _ in range(times):
            x = torch.tanh(x @ a)

    multiply(20)
    began = time.thread_time()  # so that a busy machine does not make the work less
    multiply(100)
    times = max(1, round(100 * STEP_SECONDS / (time.thread_time() - began)))
    return lambda: multiply(times)


def measure(run: RunnerRun, seconds: float) -> dict[str, Any]:
    """Alternate blocks of steps with and without a report."""
    work = calibrate()
    took: dict[bool, list[float]] = {True: [], False: []}
    passed: list[float] = []
    spent: list[float] = []
    end, step, reports = time.perf_counter() + seconds, 0, False
    while time.perf_counter() < end:
        reports = not reports
        for _ in range(_BLOCK):
            began = time.perf_counter()
            work()
            step += 1
            if reports:
                said, cpu = time.perf_counter(), time.thread_time()
                run.step(step, 1_000_000, loss=0.5, elbo=-100.0)
                spent.append(time.thread_time() - cpu)
                passed.append(time.perf_counter() - said)
            took[reports].append(time.perf_counter() - began)
    with_, without = statistics.median(took[True]), statistics.median(took[False])
    return {
        "steps": step,
        "step_ms_without": round(1000 * without, 3),
        "step_ms_with": round(1000 * with_, 3),
        "inside_us": {"cpu": _microseconds(spent), "passed": _microseconds(passed)},
        "share_cpu": round(statistics.fmean(spent) / STEP_SECONDS, 6),
        "share_passed": round(statistics.fmean(passed) / without, 6),
        "share_by_medians": round(with_ / without - 1, 6),
    }


def _microseconds(seconds: list[float]) -> dict[str, float]:
    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    return {name: round(1e6 * x, 1) for name, x in (("mean", statistics.fmean(seconds)), ("p50", p50), ("p99", p99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = socket.socketpair()
    listen = [sys.executable, "-c", _LISTEN, str(theirs.fileno())]
    with theirs, subprocess.Popen(listen, pass_fds=[theirs.fileno()]) as listener:
        channel = Channel(ours)
        assignment = Assignment(job_id="job_0", fence=1, type="train", spec={})
        figures = measure(RunnerRun(Reporter(channel), assignment), options.seconds)  # type: ignore[arg-type]
        listener.terminate()
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    json.dump(figures | machine | {"torch": torch.__version__}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
