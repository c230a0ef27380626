"""Noisemill's own processes: which commands run, and what each is told through its environment.

The commands are those of ``docker-compose.yml``.
"""

import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from noisemill.local.probe import basic_auth, http_get

FLOWER_USER = "noisemill"


@dataclass(frozen=True, kw_only=True)
class S3Access:
    """Where objects are kept, and the keys to them."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Every address and credential of one stack; the commands follow from it."""

    api_port: int
    api_key: str
    flower_port: int | None
    flower_password: str
    database_url: str
    broker_url: str
    broker_prefix: str = "noisemill:"
    s3: S3Access
    cache: Path
    train_workers: int = 1
    generate_workers: int = 1
    threads: int | None = None
    """CPU threads of each worker's runner; None leaves it to the environment."""

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def flower_url(self) -> str | None:
        return f"http://127.0.0.1:{self.flower_port}" if self.flower_port else None

    def env(self) -> dict[str, str]:
        """What every process of Noisemill is told."""
        told = {
            "NOISEMILL_DATABASE_URL": self.database_url,
            "NOISEMILL_BROKER_URL": self.broker_url,
            "NOISEMILL_S3_ENDPOINT": self.s3.endpoint,
            "NOISEMILL_S3_BUCKET": self.s3.bucket,
            "NOISEMILL_S3_ACCESS_KEY": self.s3.access_key,
            "NOISEMILL_S3_SECRET_KEY": self.s3.secret_key,
            "NOISEMILL_API_KEY": self.api_key,
            "NOISEMILL_API_URL": self.api_url,
            "NOISEMILL_WORKER_CACHE_DIR": str(self.cache),
        }
        return told | ({"NOISEMILL_API_FLOWER_URL": self.flower_url} if self.flower_url else {})

    def addresses(self) -> dict[str, Any]:
        """What ``stack.json`` tells a client."""
        return {
            "api_url": self.api_url,
            "api_key": self.api_key,
            "flower_url": self.flower_url,
            "flower_user": FLOWER_USER,
            "flower_password": self.flower_password,
            "database_url": self.database_url,
            "broker_url": self.broker_url,
            "s3": vars(self.s3),
        }


@dataclass(frozen=True, kw_only=True)
class Command:
    """A part that is one command line."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    answers: Callable[[], bool]
    grace: timedelta
    stop_signal: signal.Signals = signal.SIGTERM

    def prepare(self) -> None:
        """It keeps nothing on disk."""

    def is_ready(self) -> bool:
        return self.answers()


@dataclass(frozen=True, kw_only=True)
class Services:
    """What runs beside the servers."""

    setup: Sequence[str]
    """Run to its end before the parts are started; must be idempotent."""
    parts: Sequence[Command]


def noisemill_services(wiring: Wiring) -> Services:
    """API, workers and Flower."""
    workers = [
        _worker(wiring, f"worker-{kind}-{number}", kind)
        for kind, count in (("train", wiring.train_workers), ("generate", wiring.generate_workers))
        for number in range(1, count + 1)
    ]
    flower = [] if wiring.flower_port is None else [_flower(wiring, wiring.flower_port)]
    return Services(setup=[sys.executable, "-m", "api.setup"], parts=[_api(wiring), *workers, *flower])


def _api(wiring: Wiring) -> Command:
    place = ["--host", "127.0.0.1", "--port", str(wiring.api_port)]
    # Without a bound it would wait for clients that do not read, or send a byte now and then, until it is killed.
    ends = ["--timeout-graceful-shutdown", "5"]
    return Command(
        name="api",
        argv=[sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", *place, "--no-access-log", *ends],
        env=wiring.env(),
        answers=lambda: http_get(wiring.api_port, "/readyz")[0] == 200,
        grace=timedelta(seconds=15),
    )


def _worker(wiring: Wiring, name: str, kind: str) -> Command:
    return Command(
        name=name,
        argv=[sys.executable, "-m", "worker", "-Q", f"{kind},ingest", "-n", f"{name}@%h"],
        env=wiring.env() | _threads(wiring),
        answers=lambda: _answers_ping(wiring, f"{name}@{socket.gethostname()}"),
        grace=timedelta(seconds=45),
    )


def _threads(wiring: Wiring) -> dict[str, str]:
    return {} if wiring.threads is None else {"NOISEMILL_WORKER_THREADS": str(wiring.threads)}


def _flower(wiring: Wiring, port: int) -> Command:
    sign_in = basic_auth(FLOWER_USER, wiring.flower_password)
    options = ["--address=127.0.0.1", f"--port={port}", "--read-only"]
    return Command(
        name="flower",
        argv=[sys.executable, "-m", "celery", "-A", "worker.app", "flower", *options],
        env=wiring.env() | {"FLOWER_BASIC_AUTH": f"{FLOWER_USER}:{wiring.flower_password}"},
        answers=lambda: http_get(port, "/workers", sign_in)[0] == 200,
        grace=timedelta(seconds=10),
    )


def _answers_ping(wiring: Wiring, node: str) -> bool:
    from kombu.exceptions import KombuError
    from pydantic import SecretStr
    from redis import RedisError

    from shared.queue import make_celery
    from shared.settings import BrokerSettings

    broker = BrokerSettings(url=SecretStr(wiring.broker_url), prefix=wiring.broker_prefix)
    try:
        with make_celery(broker) as app:
            return bool(app.control.ping(destination=[node], timeout=1, limit=1))
    except (KombuError, RedisError, OSError):
        return False
