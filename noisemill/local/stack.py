"""The whole of Noisemill on this machine: bring it up, look at it, watch it, take it down.

``stack.json`` names every process that was started; only those are ever signalled. Each step is
recorded as it is done, so that a crash at any point leaves a stack that ``up`` completes and
``down`` ends.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

from noisemill.local.folder import DataFolder, Entry
from noisemill.local.plan import Plan, Wish, make_plan
from noisemill.local.ports import reserving
from noisemill.local.processes import (
    MARK,
    LocalError,
    Part,
    PartFailed,
    ask_to_stop,
    last_lines,
    launch,
    open_log,
    sweep,
    wait_ready,
    wait_stopped,
)
from noisemill.local.services import Services, Wiring, noisemill_services

START_LIMIT = timedelta(seconds=90)
_SETUP_LIMIT_SECONDS = 120
_WATCH_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 30.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """One process of the stack, as ``status`` sees it."""

    name: str
    pid: int
    is_running: bool


@dataclass
class _Crashes:
    """How often each part ended in a row, and from when on it may be started again."""

    count: dict[str, int] = field(default_factory=dict[str, int])
    not_before: dict[str, float] = field(default_factory=dict[str, float])

    def note(self, name: str) -> float:
        """Record one more; returns the seconds to wait before the next start."""
        now = time.monotonic()
        settled = now - self.not_before.get(name, now) > 2 * _LONGEST_BACKOFF_SECONDS
        self.count[name] = 1 if settled else self.count.get(name, 0) + 1
        pause = min(_LONGEST_BACKOFF_SECONDS, 0.5 * 2 ** (self.count[name] - 1))
        self.not_before[name] = now + pause
        return pause


_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _all_ends_interrupt() -> Iterator[None]:
    """Make every way of being told to end look like Ctrl-C."""
    previous = {number: signal.signal(number, signal.default_int_handler) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Stack:
    """One local stack and its data folder. Every method may be called in any state, by any process."""

    def __init__(
        self,
        data_dir: Path | str,
        *,
        say: Say = print,
        environ: Mapping[str, str] | None = None,
        services: Callable[[Wiring], Services] = noisemill_services,
    ) -> None:
        self._folder = DataFolder(Path(data_dir))
        self._say = say
        self._environ = dict(os.environ if environ is None else environ)
        self._services = services
        self._plan: Plan | None = None
        self._started = False

    @property
    def data_dir(self) -> Path:
        return self._folder.path

    def up(
        self,
        *,
        port: int | None = None,
        train_workers: int = 1,
        generate_workers: int = 1,
        flower: bool = True,
    ) -> dict[str, Any]:
        """Start what is missing, wait until all of it works, and return the content of ``stack.json``.

        A part that would now be started differently is started again. When something fails, what
        this call started is stopped; what ran before goes on.

        Raises:
            LocalError: something on this machine is missing or in the way; nothing was left running.
        """
        wish = Wish(port=port, train_workers=train_workers, generate_workers=generate_workers, flower=flower)
        with self._folder.locked(self._say), reserving() as reserve:
            entries = self._folder.entries()
            plan = make_plan(
                self._folder, wish, self._environ, running=entries.keys(), reserve=reserve, services=self._services
            )
            self._plan = plan
            before = dict(entries)
            try:
                self._bring_up(plan, entries)
            except BaseException:
                started = {name: entry for name, entry in entries.items() if before.get(name) != entry}
                self._end(started, entries)
                self._record(plan, entries)
                raise
        return self._folder.read_stack() or {}

    def down(self) -> list[str]:
        """Stop every process of the stack, the users of a part before the part. Returns their names."""
        with self._folder.locked(self._say):
            entries = self._folder.entries()
            stopped = list(entries)
            self._end(entries, entries)
            # What outlived its parent is in no list, but it carries the name of this folder.
            sweep(lambda mark: mark.partition("@")[2] == str(self.data_dir))
            self._folder.forget_stack()
        return stopped

    def status(self) -> list[PartStatus]:
        """Every process that was started, whether it still runs, or not; empty after ``down``."""
        recorded = (self._folder.read_stack() or {}).get("pids", {})
        running = self._folder.entries()
        return [PartStatus(name=name, pid=pid, is_running=name in running) for name, pid in recorded.items()]

    def info(self) -> dict[str, Any] | None:
        """The content of ``stack.json``; None when there is no stack."""
        return self._folder.read_stack()

    def watch(self) -> None:
        """Start again what ends, until the stack is taken down by somebody else. Call after ``up``."""
        plan, crashes = self._plan, _Crashes()
        if plan is None:
            raise LocalError("There is nothing to watch before up().")
        while self._folder.stack_file.exists():
            with self._folder.locked(self._say):
                if self._folder.stack_file.exists():
                    self._revive(plan, crashes)
            time.sleep(_WATCH_SECONDS)
        self._say("the stack was taken down")

    def run(self, *, on_up: Callable[[dict[str, Any]], None] = lambda addresses: None, **wish: Any) -> None:
        """``up`` and ``watch`` until Ctrl-C, SIGTERM or a closed terminal, then ``down``.

        ``on_up`` is told the content of ``stack.json`` once all of it works. Returns at once when everything was
        running already: then somebody else looks after it.
        """
        with _all_ends_interrupt():
            try:
                on_up(self.up(**wish))
                if self._started:
                    self._look_after()
            except KeyboardInterrupt:
                self._say("stopped")

    def _look_after(self) -> None:
        try:
            self.watch()
        finally:
            # An impatient second Ctrl-C would leave half of it running.
            for number in _ENDS:
                signal.signal(number, signal.SIG_IGN)
            self._say("stopping")
            self.down()

    def _bring_up(self, plan: Plan, entries: dict[str, Entry]) -> None:
        wanted = {part.name: plan.fingerprint(part) for part in plan.parts}
        outdated = {name: entry for name, entry in entries.items() if wanted.get(name) != entry.fingerprint}
        self._end(outdated, entries)
        before = dict(entries)
        self._bring_up_stage(plan, plan.servers, entries)
        self._bring_up_stage(plan, plan.services.parts, entries)
        self._record(plan, entries)
        self._started = entries != before
        self._say("everything is running" if self._started else "everything is already running")

    def _bring_up_stage(self, plan: Plan, parts: Sequence[Part], entries: dict[str, Entry]) -> None:
        self._drop_the_dying(parts, entries)
        missing = [part for part in parts if part.name not in entries]
        if missing and parts is plan.services.parts:
            self._set_up(plan)
        self._start(plan, missing, entries)
        for part in missing:
            wait_ready(part, entries[part.name].process, logs=self._folder.logs, limit=START_LIMIT)

    def _drop_the_dying(self, parts: Iterable[Part], entries: dict[str, Entry]) -> None:
        """Wait until each part that runs either works, or is found to have been on its way out."""
        for part in parts:
            if entry := entries.get(part.name):
                try:
                    wait_ready(part, entry.process, logs=self._folder.logs, limit=START_LIMIT)
                except PartFailed:
                    if entry.process.is_running:
                        raise
                    del entries[part.name]

    def _start(self, plan: Plan, parts: Iterable[Part], entries: dict[str, Entry]) -> None:
        for part in parts:
            mark = f"{part.name}@{self.data_dir}"
            sweep(lambda found, mark=mark: found == mark)
            process = launch(
                part,
                logs=self._folder.logs,
                folder=self._folder.working_directory,
                base_env={**plan.base_env, MARK: mark},
            )
            entries[part.name] = Entry(
                process=process,
                fingerprint=plan.fingerprint(part),
                stop_signal=part.stop_signal,
                grace=part.grace,
            )
            self._record(plan, entries)
            self._say(f"{part.name} started (pid {process.pid})")

    def _set_up(self, plan: Plan) -> None:
        env = {**plan.base_env, **plan.wiring.env(), MARK: f"setup@{self.data_dir}"}
        with open_log(self._folder.logs, "setup") as log:
            try:
                subprocess.run(
                    list(plan.services.setup),
                    env=env,
                    cwd=self._folder.working_directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    timeout=_SETUP_LIMIT_SECONDS,
                    check=True,
                )
            except subprocess.SubprocessError as error:
                tail = last_lines(self._folder.logs, "setup")
                raise PartFailed(f"setup failed. The end of {self._folder.logs}/setup.log:\n{tail}") from error

    def _end(self, ending: Mapping[str, Entry], entries: dict[str, Entry]) -> None:
        """Stop ``ending``, last started first, and take them out of ``entries``. Workers end together."""
        order = [name for name in reversed(entries) if name in ending]
        for _, names in groupby(order, key=lambda name: "worker" if name.startswith("worker-") else name):
            group = list(names)
            for name in group:
                ask_to_stop(entries[name].process, entries[name].stop_signal)
            for name in group:
                entry = entries.pop(name)
                in_order = wait_stopped(entry.process, entry.grace)
                self._say(f"{name} stopped" if in_order else f"{name} did not stop by itself and was killed")

    def _revive(self, plan: Plan, crashes: _Crashes) -> None:
        """Start again, after a growing pause, whatever of the last plan has ended."""
        entries = self._folder.entries()
        for part in plan.parts:
            if part.name in entries or time.monotonic() < crashes.not_before.get(part.name, 0):
                continue
            pause = crashes.note(part.name)
            self._say(f"{part.name} has ended; starting it again (log: {self._folder.logs}/{part.name}.log)")
            self._start(plan, [part], entries)
            if pause > 2:
                self._say(f"{part.name} keeps ending; the next try is {pause:.0f} s away")

    def _record(self, plan: Plan, entries: dict[str, Entry]) -> None:
        """Write ``stack.json``, with the processes in the order in which they start."""
        order = [part.name for part in plan.parts]
        known = sorted(entries, key=lambda name: order.index(name) if name in order else -1)
        sorted_entries = {name: entries[name] for name in known}
        if sorted_entries:
            self._folder.write_stack(plan.wiring.addresses(), sorted_entries)
        else:
            self._folder.forget_stack()
