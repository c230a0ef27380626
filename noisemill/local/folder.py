"""What a stack keeps on disk: what was chosen once (``secrets.json``), what runs (``stack.json``), a lock.

Both files are readable by their owner only and are replaced, never rewritten, so that a reader or
a crash sees the old or the new one.
"""

import fcntl
import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from noisemill.local.processes import LocalError, Process, wait_until


@dataclass(kw_only=True)
class Choices:
    """Credentials and ports: chosen when first needed, then kept, so that clients stay connected."""

    api_key: str = field(default_factory=lambda: f"nm_{secrets.token_urlsafe(32)}")
    valkey_password: str = field(default_factory=lambda: secrets.token_hex(24))
    postgres_password: str = field(default_factory=lambda: secrets.token_hex(24))
    s3_access_key: str = field(default_factory=lambda: secrets.token_hex(10))
    s3_secret_key: str = field(default_factory=lambda: secrets.token_hex(24))
    flower_password: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    ports: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A process of the stack, and all that is needed to end it even by a later version of this code."""

    process: Process
    fingerprint: str
    """Changes when the part would now be started in another way."""
    stop_signal: signal.Signals
    grace: timedelta

    def to_json(self) -> dict[str, Any]:
        return {
            "pid": self.process.pid,
            "started": self.process.started,
            "fingerprint": self.fingerprint,
            "stop_signal": self.stop_signal.name,
            "grace_seconds": self.grace.total_seconds(),
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Entry":
        return cls(
            process=Process(entry["pid"], entry["started"]),
            fingerprint=entry["fingerprint"],
            stop_signal=signal.Signals[entry["stop_signal"]],
            grace=timedelta(seconds=entry["grace_seconds"]),
        )


class DataFolder:
    """The folder of one stack."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self.logs = self.path / "logs"
        self.stack_file = self.path / "stack.json"
        self._choices_file = self.path / "secrets.json"

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        # Children run here: Python looks for modules in the working directory first, so it stays empty.
        self.working_directory.mkdir(exist_ok=True)

    @property
    def working_directory(self) -> Path:
        return self.path / "run"

    @contextmanager
    def locked(self, say: Callable[[str], None], limit: timedelta = timedelta(minutes=5)) -> Iterator[None]:
        """Let one ``up`` or ``down`` at a time work on this folder; the rest wait their turn."""
        self.create()
        with (self.path / "lock").open("w") as lock:
            if not _try_lock(lock.fileno()):
                say(f"another noisemill is at work in {self.path}; waiting for it")
                if not wait_until(lambda: _try_lock(lock.fileno()), limit):
                    raise LocalError(f"Another noisemill has held {self.path}/lock for {limit}; is it stuck?")
            yield

    def choices(self) -> Choices:
        """What was chosen before, completed by new choices; kept from now on."""
        kept = json.loads(self._choices_file.read_text()) if self._choices_file.exists() else {}
        choices = Choices(**kept)
        self.keep(choices)
        return choices

    def keep(self, choices: Choices) -> None:
        _replace(self._choices_file, asdict(choices))

    def read_stack(self) -> dict[str, Any] | None:
        """The content of ``stack.json``; None when no stack was started, or it was stopped."""
        try:
            return json.loads(self.stack_file.read_text())
        except FileNotFoundError:
            return None

    def entries(self) -> dict[str, Entry]:
        """The processes that were started and still run, in the order in which they were started."""
        processes = (self.read_stack() or {}).get("processes", {})
        entries = {name: Entry.from_json(entry) for name, entry in processes.items()}
        return {name: entry for name, entry in entries.items() if entry.process.is_running}

    def write_stack(self, addresses: dict[str, Any], entries: dict[str, Entry]) -> None:
        pids = {name: entry.process.pid for name, entry in entries.items()}
        processes = {name: entry.to_json() for name, entry in entries.items()}
        _replace(self.stack_file, {**addresses, "pids": pids, "processes": processes})

    def forget_stack(self) -> None:
        self.stack_file.unlink(missing_ok=True)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _replace(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
