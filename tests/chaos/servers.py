"""The whole system under test: real servers and Noisemill's own processes, behind networks that break.

Everything is started by the parts of ``noisemill.local``. What ends is started again as ``restart: always`` would, so a
kill needs nobody's hand. PostgreSQL and Valkey are reached through proxies, S3 is the strict server of this folder.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Final

import psutil
from pydantic import SecretStr
from sqlalchemy import Engine

from noisemill.local.plan import _base_env
from noisemill.local.ports import free_port
from noisemill.local.processes import MARK, LocalError, Part, Process, launch, open_log, stop, sweep, wait_ready
from noisemill.local.servers import Postgres, Valkey
from noisemill.local.services import Command, S3Access, Wiring, noisemill_services
from shared.database import make_engine
from shared.settings import DatabaseSettings
from tests.chaos.objects import Disk
from tests.chaos.proxies import PostgresProxy, Proxy, ProxyLoop
from tests.chaos.s3 import S3Server

REPOSITORY: Final = Path(__file__).parents[2]
START_LIMIT: Final = timedelta(seconds=120)
_QUEUES: Final = "train,generate,ingest"
_FIRST_PAUSE, _LONGEST_PAUSE, _SETTLED = 0.1, 10.0, 10.0
"""Seconds before a restart, doubled for each that did not live for ``_SETTLED``: Docker's, with a lower ceiling."""

_IN_USE: Final = 5.0
"""Seconds since a cached file was asked for, in which somebody may be about to open it."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How large, and how patient."""

    folder: Path
    workers: int = 4
    lease: float = 15.0
    seed: int = 0
    app: str = "worker"
    """Module that is run as a worker; the control run names one without fences."""
    disk_bytes: int = 512 * 1024 * 1024
    mount_disk: bool = False
    environ: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further settings of all parts."""
    database_proxied: bool = True
    """Whether statements go through a proxy that can lie. It is Python, in the process of the tests: it costs time."""


@dataclass(frozen=True, kw_only=True)
class WorkerProcesses:
    """The three processes of a worker that is up: Celery's parent, the supervising child, the runner."""

    name: str
    parent: psutil.Process
    child: psutil.Process
    runner: psutil.Process


def worker_processes(name: str, parent: psutil.Process) -> WorkerProcesses | None:
    """Those of the worker whose first process is ``parent``, if all of them are up."""
    tree = parent.children(recursive=True)
    runners = [process for process in tree if process.name() == "runner"]
    children = [process for process in tree if "billiard.spawn" in " ".join(process.cmdline())]
    if not runners or not children:
        return None
    return WorkerProcesses(name=name, parent=parent, child=children[0], runner=runners[0])


@dataclass
class _Kept:
    """One part that is kept running."""

    part: Part
    process: Process
    started: float
    pause: float = _FIRST_PAUSE
    not_before: float | None = None
    restarts: int = 0


class Installation:
    """All processes of one run. ``start`` returns when jobs can be submitted."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        folder, secret = setup.folder, secrets.token_hex
        self.logs = folder / "logs"
        self.postgres = Postgres(folder=folder / "postgres", port=free_port(), password=secret(16))
        self.valkey = Valkey(folder=folder / "valkey", port=free_port(), password=secret(16))
        self._loop = ProxyLoop()
        self.database_proxy = PostgresProxy(self._loop, self.postgres.port, seed=setup.seed)
        self.broker_proxy = Proxy(self._loop, self.valkey.port)
        self.disk = Disk(folder / "s3", room_bytes=setup.disk_bytes, mounted=setup.mount_disk)
        self.s3 = S3Server(self.disk, bucket="noisemill", access_key=secret(8), seed=setup.seed)
        database_port = self.database_proxy.port if setup.database_proxied else self.postgres.port
        self.wiring = Wiring(
            api_port=free_port(),
            api_key=f"nm_{secret(20)}",
            flower_port=None,
            flower_password="",
            database_url=self.postgres.url.replace(f":{self.postgres.port}/", f":{database_port}/"),
            broker_url=self.valkey.url.replace(f":{self.valkey.port}/", f":{self.broker_proxy.port}/"),
            s3=S3Access(
                endpoint=self.s3.endpoint, bucket="noisemill", access_key=self.s3.access_key, secret_key=secret(16)
            ),
            cache=folder / "cache",
            generate_workers=setup.workers,
            train_workers=0,
            threads=1,
        )
        services = noisemill_services(self.wiring)
        self._setup_command = services.setup
        self.parts: list[Part] = [self.postgres, self.valkey, *(self._adjusted(part) for part in services.parts)]
        self._kept: dict[str, _Kept] = {}
        self._lock = RLock()
        self._ending = Event()
        self._keeper = Thread(target=self._keep, name="keeper", daemon=True)

    @property
    def workers(self) -> list[str]:
        return [part.name for part in self.parts if part.name.startswith("worker-")]

    def start(self) -> None:
        self.s3.start()
        for part in self.parts[:2]:
            self._launch(part)
            self._await(part)
        self._set_up()
        for part in self.parts[2:]:
            self._launch(part)
        for part in self.parts[2:]:
            self._await(part)
        self._keeper.start()

    def stop(self) -> None:
        """End every process, whatever state it is in."""
        self._ending.set()
        if self._keeper.is_alive():
            self._keeper.join(60)
        with self._lock:
            for name, kept in reversed(self._kept.items()):
                at_once = name not in ("postgres", "valkey")
                stop(kept.process, first=signal.SIGKILL if at_once else kept.part.stop_signal, grace=kept.part.grace)
        sweep(lambda mark: mark.partition("@")[2] == str(self.setup.folder))
        self.broker_proxy.close()
        self.database_proxy.close()
        self._loop.close()
        self.s3.stop()
        self.disk.close()

    @contextmanager
    def running(self) -> Iterator["Installation"]:
        try:
            self.start()
            yield self
        finally:
            self.stop()

    def engine(self) -> Engine:
        """Straight to PostgreSQL, past the proxy."""
        return make_engine(DatabaseSettings(url=SecretStr(self.postgres.url), pool_size=2), "checker")

    def pid(self, name: str) -> int | None:
        """Of a part that runs now."""
        with self._lock:
            kept = self._kept[name]
            return kept.process.pid if kept.process.is_running else None

    def is_ready(self, name: str) -> bool:
        """Whether a part answers a real request."""
        return next(part for part in self.parts if part.name == name).is_ready()

    def end(self, name: str, number: signal.Signals, *, stay_down: float = 0.0) -> bool:
        """Signal a part that is to end, and let it stay down for some seconds; False if it was down already."""
        with self._lock:
            pid = self.pid(name)
            if pid is None:
                return False
            kept = self._kept[name]
            kept.not_before = time.monotonic() + max(stay_down, kept.pause)
            os.kill(pid, number)
            return True

    def tree(self, name: str) -> list[psutil.Process]:
        """All processes of a part that runs now."""
        pid = self.pid(name)
        with suppress(psutil.Error):
            if pid is not None:
                first = psutil.Process(pid)
                return [first, *first.children(recursive=True)]
        return []

    def processes(self, name: str) -> WorkerProcesses | None:
        """The processes of a worker, if all of them are up."""
        pid = self.pid(name)
        with suppress(psutil.Error):
            if pid is not None:
                return worker_processes(name, psutil.Process(pid))
        return None

    def forget_downloads(self) -> None:
        """Empty the workers' cache of what nobody has just asked for, as workers do that need the room."""
        for path in self.wiring.cache.glob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and time.time() - path.stat().st_mtime > _IN_USE:
                    path.unlink()

    def collect(self) -> None:
        """Housekeeping that waits for nothing, twice: what the first round marks, the second deletes."""
        at_once = dict.fromkeys(
            ("NOISEMILL_JOBS_ORPHAN_GRACE", "NOISEMILL_WORKER_COLLECT", "NOISEMILL_S3_LINK_LIFETIME"), "0.001"
        )
        env = self._env("janitor") | self.wiring.env() | at_once
        with open_log(self.logs, "janitor") as log:
            for _ in range(2):
                command = [sys.executable, "-m", "worker.janitor"]
                subprocess.run(command, env=env, stdout=log, stderr=log, check=True, timeout=120)

    def restarts(self) -> Mapping[str, int]:
        """How often each part was started again."""
        return {name: kept.restarts for name, kept in self._kept.items() if kept.restarts}

    def _adjusted(self, command: Command) -> Command:
        """The same command, for every queue and with the app of this run."""
        argv = [_QUEUES if word == "generate,ingest" else word for word in command.argv]
        return replace(command, argv=[self.setup.app if word == "worker" else word for word in argv])

    def _env(self, name: str) -> dict[str, str]:
        own = {key: value for key, value in _base_env(os.environ).items() if not key.startswith("NOISEMILL_")}
        return own | {
            MARK: f"{name}@{self.setup.folder}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "NOISEMILL_JOBS_LEASE": str(self.setup.lease),
            "NOISEMILL_JOBS_MAX_ATTEMPTS": "10",
            # Short, so that jobs give way to others now and then.
            "NOISEMILL_WORKER_TIME_SLICE": "1",
            **self.setup.environ,
        }

    def _launch(self, part: Part) -> None:
        folder = self.setup.folder
        process = launch(part, logs=self.logs, folder=folder, base_env=self._env(part.name))
        self._kept[part.name] = _Kept(part=part, process=process, started=time.monotonic())

    def _await(self, part: Part) -> None:
        wait_ready(part, self._kept[part.name].process, logs=self.logs, limit=START_LIMIT)

    def _set_up(self) -> None:
        with open_log(self.logs, "setup") as log:
            env = self._env("setup") | self.wiring.env()
            subprocess.run(self._setup_command, env=env, stdout=log, stderr=log, check=True, timeout=120)

    def _keep(self) -> None:
        while not self._ending.wait(0.1):
            with self._lock:
                for kept in list(self._kept.values()):
                    if not kept.process.is_running:
                        self._restart(kept)

    def _restart(self, kept: _Kept) -> None:
        now = time.monotonic()
        if kept.not_before is None:
            kept.not_before = now + kept.pause
        if now < kept.not_before:
            return
        pause = _FIRST_PAUSE if now - kept.started > _SETTLED else min(_LONGEST_PAUSE, 2 * kept.pause)
        try:
            self._launch(kept.part)
        except LocalError:
            kept.not_before = now + 1
            return
        again = self._kept[kept.part.name]
        again.pause, again.restarts = pause, kept.restarts + 1
