"""What goes wrong, when: a seeded stream of faults of many kinds, each recorded with its time and its target.

Four streams run at once: kills, zombies (a worker is stopped until its lease is lost, then continues), naps (the API or
a runner alone is stopped for seconds, which must cost nothing), and outages of what the processes depend on. Nothing is
repaired by hand: killed processes are restarted by the installation.
"""

import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from threading import Event, Thread
from typing import Any, Final
from uuid import UUID

import psutil
import redis
from sqlalchemy import Row, text
from sqlalchemy.exc import SQLAlchemyError

from tests.chaos.lookout import Lookout
from tests.chaos.servers import Installation, WorkerProcesses

logger = logging.getLogger(__name__)

KILLS: Final[Mapping[str, int]] = {"kill_runner": 5, "kill_supervisor": 3, "kill_worker": 4, "kill_api": 2}
"""Each with its weight."""
ZOMBIES: Final = ("stop_worker", "stop_supervisor")
NAPS: Final = ("stop_api", "stop_runner")
"""A runner's supervisor keeps its lease meanwhile, and waits minutes before it takes the runner for stalled."""
OUTAGES: Final[Mapping[str, int]] = {
    "flush_broker": 1, "kill_broker": 1, "blind_broker": 1, "cut_broker": 1,
    "restart_database": 1, "kill_database": 1, "terminate_backends": 2, "lie_about_commits": 2,
    "s3_error": 1, "s3_stall": 1, "s3_reset": 1, "s3_truncate": 1, "s3_lie": 1, "fill_disk": 1,
}  # fmt: skip
_S3_SHARE: Final = {"error": 0.6, "stall": 0.3, "reset": 0.4, "truncate": 0.6, "lie": 0.4}
_ZOMBIE_PATIENCE: Final = 20.0
"""Seconds that a zombie sleeps on at most, for the next attempt to begin."""
_SHORTEST_NAP: Final = 2.0
"""Seconds; the longest takes half a lease."""
_REST: Final = 0.5
"""Seconds for which a runner must do hardly anything to be taken for done."""
_LONGEST_OUTAGE: Final = 40.0
"""Seconds that storage fails at most."""
LIE_SHARE: Final = 0.2
"""Of the commits while there are lies; half of them are executed, so one in ten executes and reports failure."""

_HELD: Final = text("""
    SELECT jobs.id, jobs.fence, jobs.worker, jobs.fence > jobs.max_attempts - 3 AS is_spent
    FROM jobs JOIN attempts USING (fence)
    WHERE attempts.job_id = jobs.id AND state IN ('running', 'canceling', 'pausing') AND lease_until > clock_timestamp()
        AND clock_timestamp() - attempts.started_at >= make_interval(secs => :age) ORDER BY jobs.id
""")
_ATTEMPTS: Final = text("SELECT fence, outcome FROM attempts WHERE job_id = :job_id")
_BACKENDS: Final = text("""
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name LIKE 'noisemill%' AND hashtext(pid::text || :salt) % 2 = 0
""")


@dataclass(frozen=True, kw_only=True)
class Goals:
    """How much must go wrong before a run may end, and how fast."""

    kills: int = 100
    zombies: int = 50
    kill_every: float = 4.0
    """Seconds, on average; also for outages."""
    outage_every: float = 14.0
    stop_every: float = 9.0
    nap_every: float = 20.0
    stopped_at_once: int = 2
    stopped_after: float = 0.0
    """Seconds that an attempt must have run before its worker is stopped."""
    one_each: bool = False
    """Whether of each job only the first attempt is stopped, and continues when its runner has nothing left to do."""
    spared: int = 2
    """Workers that are up and hold a job, below which none is killed or stopped: a run must get on."""
    kinds: frozenset[str] = frozenset({*KILLS, *ZOMBIES, *NAPS, *OUTAGES})


@dataclass(kw_only=True)
class Fault:
    """One thing that went wrong."""

    kind: str
    target: str
    at: datetime
    """By the database's clock, where there was one."""
    seconds: float = 0.0
    job_id: UUID | None = None
    """The job whose attempt was hit, if one was."""
    fence: int = 0
    became_zombie: bool = False

    @property
    def until(self) -> datetime:
        """When it was over."""
        return self.at + timedelta(seconds=self.seconds)


@dataclass(kw_only=True)
class _Stopped:
    """A worker that is stopped now."""

    fault: Fault
    processes: list[psutil.Process]
    since: float
    runner: psutil.Process
    wake_at: float = float("inf")
    looked_at: float = 0.0
    spent: float = -1.0
    """Seconds of CPU that the runner had had then."""


class Nemesis:
    """Breaks an installation until its goals are met, and on until it is told to end."""

    def __init__(self, installation: Installation, goals: Goals, seed: int) -> None:
        self._installation, self._goals = installation, goals
        self._chance = {stream: random.Random(f"{stream} {seed}") for stream in ("kill", "stop", "nap", "outage")}
        self._engine = installation.engine()
        self._stopped: dict[str, _Stopped] = {}
        self._napping = ""
        """The worker whose runner is stopped alone."""
        self._ending = Event()
        self.lookout = Lookout(self.ask)
        streams = (self._kill_on, self._stop_on, self._nap_on, self._outages_on)
        self._streams = [Thread(target=self._guard, args=(stream,), name=stream.__name__) for stream in streams]
        self.faults: list[Fault] = []
        self.failures: list[str] = []
        """What ended a stream of faults that should have gone on: a bug of ours."""

    @property
    def kills(self) -> int:
        return sum(fault.kind in KILLS for fault in self.faults)

    @property
    def zombies(self) -> int:
        return sum(fault.became_zombie for fault in self.faults)

    @property
    def progress(self) -> float:
        """From 0 to 1: how much of the goals is met."""
        goals, met = self._goals, {fault.kind for fault in self.faults} & self._goals.kinds
        parts = [(self.kills, goals.kills), (self.zombies, goals.zombies), (len(met), len(goals.kinds))]
        return min(1.0, *(reached / goal for reached, goal in parts if goal))

    def counts(self) -> Mapping[str, int]:
        return dict(sorted(Counter(fault.kind for fault in self.faults).items()))

    def start(self) -> None:
        self.lookout.start()
        for stream in self._streams:
            stream.start()

    def stop(self) -> None:
        """Break nothing more, undo what lasts, and wake who was stopped."""
        self._ending.set()
        for stream in self._streams:
            stream.join()

    def close(self) -> None:
        """Look no longer, either."""
        self.stop()
        self.lookout.stop()
        self._engine.dispose()

    def _guard(self, stream: Callable[[], None]) -> None:
        try:
            stream()
        except Exception as error:
            logger.exception("a stream of faults has ended")
            self.failures.append(f"{stream.__name__}: {type(error).__name__}: {error}")

    # Kills

    def _kill_on(self) -> None:
        chance, kinds = self._chance["kill"], [kind for kind in KILLS if kind in self._goals.kinds]
        (kind,) = chance.choices(kinds, [KILLS[kind] for kind in kinds]) if kinds else ("",)
        next_kill = time.monotonic()
        while kinds and not self._ending.wait(0.2):
            if time.monotonic() < next_kill:
                continue
            # A kind that cannot be done now is waited for, so that the shares stay what they are.
            if self._kill_api() if kind == "kill_api" else self._kill_in_worker(kind, chance):
                (kind,) = chance.choices(kinds, [KILLS[kind] for kind in kinds])
                next_kill = time.monotonic() + self._goals.kill_every * chance.uniform(0.4, 1.6)

    def _kill_api(self) -> bool:
        """Only one that serves: one that never comes up would end the load, not test it."""
        at = self._now()
        is_hit = self._installation.is_ready("api") and self._installation.end("api", signal.SIGKILL)
        if is_hit:
            self.faults.append(Fault(kind="kill_api", target="api", at=at))
        return is_hit

    def _kill_in_worker(self, kind: str, chance: random.Random) -> bool:
        processes = self._choose_worker(chance)
        if processes is None:
            return False
        held = self._held_by(processes.name)
        job = {} if held is None else {"job_id": held.id, "fence": held.fence}
        fault = Fault(kind=kind, target=processes.name, at=self._now(), **job)
        with suppress(psutil.Error):
            if kind == "kill_worker":
                self._installation.end(processes.name, signal.SIGKILL)
            else:
                (processes.runner if kind == "kill_runner" else processes.child).kill()
            self.faults.append(fault)
        return True

    def _choose_worker(self, chance: random.Random, *, after: float = 0.0) -> WorkerProcesses | None:
        """A worker that has held a job for some seconds, if enough others do; none whose job another blow might end."""
        held = [row for row in self.ask(_HELD, age=after) if not (self._goals.one_each and row.fence > 1)]
        spent = {row.worker.partition("@")[0] for row in self.ask(_HELD, age=0.0) if row.is_spent}
        busy = {row.worker.partition("@")[0] for row in held} - {*self._stopped, self._napping} - spent
        up = [found for name in sorted(busy) if (found := self._installation.processes(name)) is not None]
        return chance.choice(up) if len(up) > min(self._goals.spared, len(self._installation.workers) - 1) else None

    # Zombies

    def _stop_on(self) -> None:
        chance, kinds = self._chance["stop"], [kind for kind in ZOMBIES if kind in self._goals.kinds]
        next_stop = time.monotonic()
        while kinds and not self._ending.wait(0.2):
            may_stop = len(self._stopped) < self._goals.stopped_at_once and time.monotonic() >= next_stop
            if may_stop and self._stop(chance.choice(kinds), chance):
                next_stop = time.monotonic() + self._goals.stop_every * chance.uniform(0.5, 1.5)
            for name, stopped in list(self._stopped.items()):
                self._look_after(name, stopped, chance)
        for name, stopped in list(self._stopped.items()):
            self._wake(name, stopped)

    def _stop(self, kind: str, chance: random.Random) -> bool:
        """Stop a worker in the middle of a job; False if there was none to stop."""
        processes = self._choose_worker(chance, after=self._goals.stopped_after)
        if processes is None:
            return False
        targets = [processes.child] if kind == "stop_supervisor" else [processes.child, processes.runner]
        fault = Fault(kind=kind, target=processes.name, at=self._now())
        stopped = self._stopped[processes.name] = _Stopped(
            fault=fault, processes=targets, since=time.monotonic(), runner=processes.runner
        )
        with suppress(psutil.Error):
            for target in targets:
                target.suspend()
        # Asked only now: the job that it held a moment ago may have ended.
        held = self._held_by(processes.name)
        if held is None:
            self._wake(processes.name, stopped)
            return False
        fault.job_id, fault.fence = held.id, held.fence
        self.faults.append(fault)
        return True

    def _look_after(self, name: str, stopped: _Stopped, chance: random.Random) -> None:
        """Wake the worker when its lease was lost and the next attempt has begun: then it can do most harm."""
        fault, now = stopped.fault, time.monotonic()
        outcomes = {row.fence: row.outcome for row in self.ask(_ATTEMPTS, job_id=fault.job_id)}
        if outcomes.get(fault.fence) == "lost":
            fault.became_zombie = True
            if fault.fence + 1 in outcomes and (not self._goals.one_each or _rests(stopped, now)):
                stopped.wake_at = min(stopped.wake_at, now + chance.uniform(0, 1))
            stopped.wake_at = min(stopped.wake_at, now + _ZOMBIE_PATIENCE)
        elif outcomes.get(fault.fence) is not None or now - stopped.since > 5 * self._installation.setup.lease:
            stopped.wake_at = now
        if now >= stopped.wake_at:
            self._wake(name, stopped)

    def _wake(self, name: str, stopped: _Stopped) -> None:
        for process in stopped.processes:
            with suppress(psutil.Error):
                process.resume()
        stopped.fault.seconds = time.monotonic() - stopped.since
        del self._stopped[name]

    # Naps

    def _nap_on(self) -> None:
        chance, kinds = self._chance["nap"], [kind for kind in NAPS if kind in self._goals.kinds]
        while kinds and not self._ending.wait(self._goals.nap_every * chance.uniform(0.5, 1.5)):
            kind = chance.choice(kinds)
            seconds = chance.uniform(_SHORTEST_NAP, max(_SHORTEST_NAP, self._installation.setup.lease / 2))
            while not self._ending.is_set() and not self._nap(kind, seconds, chance):
                self._ending.wait(0.2)

    def _nap(self, kind: str, seconds: float, chance: random.Random) -> bool:
        """Stop it for so long, or until the end of the run; False if there was none to stop."""
        fault = Fault(kind=kind, target="api", at=self._now())
        if kind == "stop_api":
            targets = self._installation.tree("api") if self._installation.is_ready("api") else []
        elif (worker := self._choose_worker(chance)) is None:
            targets = []
        else:
            targets, fault.target, self._napping = [worker.runner], worker.name, worker.name
        began, stopped = time.monotonic(), list[psutil.Process]()
        try:
            for target in targets:
                with suppress(psutil.Error):
                    target.suspend()
                    stopped.append(target)
            if stopped and kind == "stop_runner" and (held := self._held_by(fault.target)) is not None:
                fault.job_id, fault.fence = held.id, held.fence
            if stopped:
                self._ending.wait(seconds)
        finally:
            for target in stopped:
                with suppress(psutil.Error):
                    target.resume()
            self._napping = ""
        fault.seconds = time.monotonic() - began
        if stopped:
            self.faults.append(fault)
        return bool(stopped)

    # Outages

    def _outages_on(self) -> None:
        chance = self._chance["outage"]
        waiting: list[str] = []
        while not self._ending.wait(self._goals.outage_every * chance.uniform(0.5, 1.5)):
            if not waiting:  # every kind before any comes again, in an order that the seed decides
                chosen = [kind for kind, weight in OUTAGES.items() for _ in range(weight) if kind in self._goals.kinds]
                waiting = chance.sample(chosen, len(chosen))
            if not waiting:
                return
            kind = waiting.pop()
            fault = Fault(kind=kind, target=kind.partition("_")[2], at=self._now())
            began = time.monotonic()
            with suppress(redis.RedisError, SQLAlchemyError):
                if kind.startswith("s3_"):
                    self._break_s3(kind.removeprefix("s3_"), chance)
                else:
                    _BREAK[kind](self, chance)
                fault.seconds = time.monotonic() - began
                self.faults.append(fault)

    def _break_s3(self, kind: str, chance: random.Random) -> None:
        if kind in ("reset", "truncate"):  # or nothing would be downloaded while that breaks
            self._installation.forget_downloads()
        self._installation.s3.faults.begin(kind, _S3_SHARE[kind])
        self._wait_for_hits(kind, chance.uniform(4, 10))
        self._installation.s3.faults.end()

    def _fill_disk(self, chance: random.Random) -> None:
        self._installation.disk.fill()
        self._wait_for_hits("disk_full", chance.uniform(3, 8))
        self._installation.disk.free()

    def _wait_for_hits(self, kind: str, seconds: float) -> None:
        """At least so long, and on until a request was hit: what nobody meets is no fault."""
        hits, began = self._installation.s3.faults.hits, time.monotonic()
        before = hits[kind]
        while not self._ending.wait(0.2):
            spent = time.monotonic() - began
            if spent > _LONGEST_OUTAGE or (spent > seconds and hits[kind] > before):
                return

    def _flush_broker(self, chance: random.Random) -> None:
        valkey = self._installation.valkey
        with redis.Redis(port=valkey.port, password=valkey.password, socket_timeout=5) as broker:
            broker.flushall()

    def _kill_broker(self, chance: random.Random) -> None:
        self._installation.end("valkey", signal.SIGKILL, stay_down=chance.uniform(0, 8))

    def _blind_broker(self, chance: random.Random) -> None:
        self._installation.broker_proxy.go_blind()
        self._ending.wait(chance.uniform(5, 15))
        self._installation.broker_proxy.see_again()

    def _cut_broker(self, chance: random.Random) -> None:
        self._installation.broker_proxy.cut()

    def _restart_database(self, chance: random.Random) -> None:
        self._installation.end("postgres", signal.SIGINT)

    def _kill_database(self, chance: random.Random) -> None:
        self._installation.end("postgres", signal.SIGKILL, stay_down=chance.uniform(0, 4))

    def _terminate_backends(self, chance: random.Random) -> None:
        self.ask(_BACKENDS, salt=str(chance.random()))

    def _lie_about_commits(self, chance: random.Random) -> None:
        self._installation.database_proxy.lie_share = LIE_SHARE
        self._ending.wait(chance.uniform(8, 16))
        self._installation.database_proxy.lie_share = 0.0

    # Looking

    def _held_by(self, worker: str) -> Row[Any] | None:
        """The job that a worker holds a lease on."""
        return next((row for row in self.ask(_HELD, age=0.0) if row.worker.partition("@")[0] == worker), None)

    def _now(self) -> datetime:
        rows = self.ask(text("SELECT clock_timestamp() AS now"))
        return rows[0].now if rows else datetime.now().astimezone()

    def ask(self, question: Any, **about: Any) -> list[Row[Any]]:
        """Straight to SQL; nothing when it is away, as we made it be."""
        with suppress(SQLAlchemyError), self._engine.begin() as connection:
            return list(connection.execute(question, about))
        return []


_BREAK: Final[Mapping[str, Callable[[Nemesis, random.Random], None]]] = {
    "flush_broker": Nemesis._flush_broker,
    "kill_broker": Nemesis._kill_broker,
    "blind_broker": Nemesis._blind_broker,
    "cut_broker": Nemesis._cut_broker,
    "restart_database": Nemesis._restart_database,
    "kill_database": Nemesis._kill_database,
    "terminate_backends": Nemesis._terminate_backends,
    "lie_about_commits": Nemesis._lie_about_commits,
    "fill_disk": Nemesis._fill_disk,
}


def _rests(stopped: _Stopped, now: float) -> bool:
    """Whether the runner has hardly used the CPU since it was looked at; at most twice a second."""
    if now - stopped.looked_at < _REST:
        return False
    spent = 0.0
    with suppress(psutil.Error):
        times = stopped.runner.cpu_times()
        spent = times.user + times.system
    rests = 0 <= spent - stopped.spent < _REST / 10 and stopped.spent >= 0
    stopped.looked_at, stopped.spent = now, spent
    return rests
