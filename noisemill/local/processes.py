"""Operating-system processes that may outlive us: start, recognise, await and stop them.

A pid proves nothing, because numbers are used again: a ``Process`` also holds the moment it was
started, and nothing is ever signalled before both have been compared.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from io import BufferedWriter
from pathlib import Path
from typing import Protocol

MARK = "LOCAL_PART"
"""Environment variable that tells which part of which stack a process, or its ancestor, is."""

_POLL_SECONDS = 0.03
_LOG_LIMIT_BYTES = 20 * 1024 * 1024

# Our own children, so that the dead ones are reaped and never seen as zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


class LocalError(Exception):
    """Something on this machine keeps the local stack from running; the message says what to do."""


class PartFailed(LocalError):
    """A process ended, or did not become ready in time; the message ends with its last log lines."""


class Part(Protocol):
    """One process of the stack: how to start it and how to know that it works."""

    @property
    def name(self) -> str: ...

    @property
    def argv(self) -> Sequence[str]: ...

    @property
    def env(self) -> Mapping[str, str]:
        """Variables added to those of the caller."""
        ...

    @property
    def stop_signal(self) -> signal.Signals:
        """Asks for an orderly end."""
        ...

    @property
    def grace(self) -> timedelta:
        """How long an orderly end may take before it is forced."""
        ...

    def prepare(self) -> None:
        """Bring the part's folder into a state to start from."""
        ...

    def is_ready(self) -> bool:
        """Make a real request and say whether it was answered."""
        ...


@dataclass(frozen=True)
class Process:
    """A process that was started once, told apart from a later one with the same pid."""

    pid: int
    started: str

    @property
    def is_running(self) -> bool:
        return start_of(self.pid) == self.started


def start_of(pid: int) -> str | None:
    """When ``pid`` was started, as an opaque text; None if there is no such process, or it is dead."""
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]
    if sys.platform != "linux":
        return _start_by_psutil(pid)
    with suppress(OSError):
        # The name, in parentheses, may hold spaces: the fixed fields begin after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return f"{_boot()}/{fields[19]}"
    return None


def _boot() -> str:
    # Start times count from the boot, so equal ones of two boots must differ in something else.
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_by_psutil(pid: int) -> str | None:
    import psutil

    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return repr(process.create_time())
    return None


def launch(part: Part, *, logs: Path, folder: Path, base_env: Mapping[str, str]) -> Process:
    """Start ``part`` in a session of its own, logging to ``logs``; ``folder`` is its working directory."""
    part.prepare()
    with open_log(logs, part.name) as log:
        child = subprocess.Popen(
            list(part.argv),
            env={**base_env, **part.env},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Asked before the child is polled: a dead child that was not reaped still has its start time.
    started = start_of(child.pid)
    _children[child.pid] = child
    return Process(child.pid, started or "already ended")


def open_log(logs: Path, name: str) -> BufferedWriter:
    """Open a part's log for appending; one that has grown large is put aside first."""
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = logs / f"{name}.log"
    if path.exists() and path.stat().st_size > _LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def last_lines(logs: Path, name: str, count: int = 15) -> str:
    """The end of a part's log, for an error message."""
    with suppress(OSError), (logs / f"{name}.log").open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])
    return "(no log)"


def wait_ready(part: Part, process: Process, *, logs: Path, limit: timedelta) -> None:
    """Return once ``part`` answers a real request.

    Raises:
        PartFailed: the process ended, or ``limit`` passed.
    """
    if wait_until(lambda: not process.is_running or part.is_ready(), limit) and process.is_running:
        return
    fate = f"not ready after {limit.total_seconds():.0f} s" if process.is_running else "ended while starting"
    log = logs / f"{part.name}.log"
    raise PartFailed(f"{part.name}: {fate}. The end of {log}:\n{last_lines(logs, part.name)}")


def wait_until(condition: Callable[[], bool], limit: timedelta) -> bool:
    """Poll ``condition``; say whether it came true within ``limit``."""
    deadline = time.monotonic() + limit.total_seconds()
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def ask_to_stop(process: Process, first: signal.Signals) -> None:
    """Ask for an orderly end and return at once."""
    with suppress(ProcessLookupError):
        if process.is_running:
            os.kill(process.pid, first)


def stop(process: Process, *, first: signal.Signals = signal.SIGTERM, grace: timedelta) -> bool:
    """End ``process``: ask, wait ``grace``, force its whole group. Say whether it ended by itself."""
    ask_to_stop(process, first)
    return wait_stopped(process, grace)


def wait_stopped(process: Process, grace: timedelta) -> bool:
    """Wait for a process that was asked to stop; after ``grace``, kill its group and return False."""
    if wait_until(lambda: not process.is_running, grace):
        return True
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    wait_until(lambda: not process.is_running, timedelta(seconds=10))
    return False


def sweep(is_meant: Callable[[str], bool]) -> list[int]:
    """Kill every process whose mark ``is_meant``: what a dead part left behind.

    It finds grandchildren in sessions of their own, and parts whose start was never recorded.
    """
    found = [process for process in _marked(is_meant) if process.is_running]
    for process in found:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    for process in found:
        wait_until(lambda process=process: not process.is_running, timedelta(seconds=5))
    return [process.pid for process in found]


def _marked(is_meant: Callable[[str], bool]) -> Iterator[Process]:
    import psutil

    for candidate in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if candidate.pid != os.getpid() and is_meant(candidate.environ().get(MARK, "")):
                started = start_of(candidate.pid)
                if started is not None:
                    yield Process(candidate.pid, started)
