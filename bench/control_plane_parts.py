"""The processes that ``bench/control_plane.py`` measures: ours and the peer's, on one set of real servers.

PostgreSQL runs as it does in production, with every commit on disk before it is confirmed. Valkey serves both sides, in
two of its databases. Both services are one uvicorn process with the same options.
"""

import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import psycopg
import redis

from bench.load import Target
from noisemill.client import Client
from noisemill.local.ports import free_port
from noisemill.local.probe import http_get
from noisemill.local.processes import Part, Process, last_lines, launch, stop, wait_ready
from noisemill.local.servers import ObjectStore, Postgres, Valkey
from noisemill.local.services import Command, S3Access, Wiring, noisemill_services

REPOSITORY: Final = Path(__file__).parents[1]
START_LIMIT: Final = timedelta(seconds=120)
MAX_QUEUED: Final = 10_000_000
"""A tenant may have 10,000 jobs waiting; the load is one tenant's, and nobody works on it."""
MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "tiny": {"family": "gan", "network": "mlp", "hidden_dim": 32, "latent_dim": 8, "batch_size": 16},
    "tiny-diffusion": {"family": "diffusion", "preset": "xs", "batch_size": 16},
}
"""Trained for one step: what they draw is noise, and drawn as fast as anything else."""


@dataclass(kw_only=True)
class House:
    """Servers that run, and the commands of what is measured on them."""

    folder: Path
    postgres: Postgres
    valkey: Valkey
    wiring: Wiring
    peer_port: int
    running: dict[str, tuple[Part, Process]] = field(default_factory=dict[str, tuple[Part, Process]])

    @property
    def notes(self) -> Path:
        """Where runners note when they report."""
        return self.folder / "notes"

    @property
    def peer_url(self) -> str:
        return self.valkey.url.removesuffix("/0") + "/1"

    @property
    def peer_env(self) -> Mapping[str, str]:
        return {"CELERY_SERVICE_URL": self.peer_url}

    def start(self, part: Part) -> Process:
        process = launch(part, logs=self.folder / "logs", folder=self.folder, base_env=_environment())
        self.running[part.name] = part, process
        return process

    def await_ready(self, part: Part) -> None:
        wait_ready(part, self.running[part.name][1], logs=self.folder / "logs", limit=START_LIMIT)

    def stop(self, name: str) -> None:
        part, process = self.running.pop(name)
        stop(process, first=part.stop_signal, grace=part.grace)

    @contextmanager
    def with_parts(self, *parts: Part) -> Iterator[None]:
        """Started and ready; ended afterwards."""
        try:
            for part in parts:
                self.start(part)
            for part in parts:
                self.await_ready(part)
            yield
        finally:
            for part in reversed(parts):
                if part.name in self.running:
                    self.stop(part.name)

    def api(self) -> Command:
        (command,) = (part for part in noisemill_services(self.wiring).parts if part.name == "api")
        return replace(command, env={**command.env, "NOISEMILL_JOBS_MAX_QUEUED": str(MAX_QUEUED)})

    def worker(self, *, executes: str = "jobs") -> Command:
        """One worker for all queues, with a runner that notes moments; ``executes`` is ``jobs`` or ``nothing``."""
        wiring = replace(self.wiring, generate_workers=1)
        (command,) = (part for part in noisemill_services(wiring).parts if part.name.startswith("worker-"))
        renamed = {"worker": "bench.probed_worker", "generate,ingest": "train,generate,ingest"}
        env = {**command.env, "BENCH_NOTES": str(self.notes), "BENCH_EXECUTES": executes}
        return replace(command, argv=[renamed.get(word, word) for word in command.argv], env=env)

    def peer(self) -> Command:
        """The peer's API, started as ours is."""
        place = ["--host", "127.0.0.1", "--port", str(self.peer_port)]
        return Command(
            name="peer",
            argv=[sys.executable, "-m", "uvicorn", "bench.celery_service:app", *place, "--no-access-log"],
            env=self.peer_env,
            answers=lambda: http_get(self.peer_port, "/openapi.json")[0] == 200,
            grace=timedelta(seconds=15),
        )

    def peer_worker(self) -> Command:
        """The peer's worker: Celery's defaults, one process."""
        options = ["--concurrency", "1", "--loglevel", "INFO"]
        argv = [sys.executable, "-m", "celery", "-A", "bench.celery_service:celery", "worker", *options]
        return Command(
            name="peer-worker",
            argv=argv,
            env=self.peer_env,
            answers=self._peer_works,
            grace=timedelta(seconds=15),
        )

    def _peer_works(self) -> bool:
        with redis.Redis.from_url(self.peer_url) as client:
            return b"ready." in (self.folder / "logs" / "peer-worker.log").read_bytes() and bool(client.ping())

    def client(self) -> Client:
        return Client(self.wiring.api_url, self.wiring.api_key, timeout=120)

    def sql(self, statement: str) -> list[Any]:
        """Rows of one statement."""
        with psycopg.connect(self.postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def clear(self) -> None:
        """Forget all that was submitted, on both sides."""
        for statement in ("DELETE FROM jobs WHERE type = 'generate'", "DELETE FROM usage", "VACUUM ANALYZE"):
            self.sql(statement)
        with redis.Redis.from_url(self.valkey.url) as client:
            client.flushall()

    def ours(self, model: str = "tiny@1", *, keyed: bool = False, **headers: str) -> Target:
        """Our submission; ``keyed``: with an idempotency key, as our client sends it."""
        authorized = {"Authorization": f"Bearer {self.wiring.api_key}", **headers}
        salt = secrets.token_hex(8)
        return Target(
            port=self.wiring.api_port,
            path="/v1/jobs",
            body=lambda n: {"type": "generate", "spec": {**SMALLEST, "model": model, "seed": n}},
            headers=lambda n: authorized | ({"Idempotency-Key": f"{salt}-{n}"} if keyed else {}),
            expects=200 if "Prefer" in headers else 202,
        )

    def theirs(self) -> Target:
        body = {"model": "tiny@1", "num_samples": 1}
        return Target(port=self.peer_port, path="/jobs", body=lambda n: {**body, "seed": n})


SMALLEST: Final = {"task": "generate", "num_samples": 1}


def _environment() -> dict[str, str]:
    """Ours without settings of somebody's own stack; and threads that do not get into each other's way."""
    foreign = ("NOISEMILL_", "CELERY_", "FLOWER_", "NANIO_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
    return env | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@contextmanager
def house(folder: Path) -> Iterator[House]:
    """Servers with a schema, a bucket and a key; all that was started is ended."""
    secret = secrets.token_hex
    postgres = Postgres(folder=folder / "postgres", port=free_port(), password=secret(16))
    valkey = Valkey(folder=folder / "valkey", port=free_port(), password=secret(16))
    store = ObjectStore(folder=folder / "s3", port=free_port(), access_key=secret(8), secret_key=secret(16))
    wiring = Wiring(
        api_port=free_port(),
        api_key=f"nm_{secret(20)}",
        flower_port=None,
        flower_password="",
        database_url=postgres.url,
        broker_url=valkey.url,
        s3=S3Access(
            endpoint=store.endpoint, bucket="noisemill", access_key=store.access_key, secret_key=store.secret_key
        ),
        cache=folder / "cache",
        train_workers=0,
        generate_workers=0,
        threads=1,
    )
    made = House(folder=folder, postgres=postgres, valkey=valkey, wiring=wiring, peer_port=free_port())
    with made.with_parts(postgres, valkey, store):
        setup = noisemill_services(wiring).setup
        subprocess.run(list(setup), env={**_environment(), **wiring.env()}, check=True, capture_output=True)
        try:
            yield made
        finally:
            for name in list(made.running):
                if name not in ("postgres", "valkey", "s3"):
                    made.stop(name)


def train(here: House) -> None:
    """Make ``MODELS``; needs API and worker."""
    path = here.folder / "squares.npz"
    squares = (np.arange(64 * 16 * 16) % 251).astype(np.uint8).reshape(64, 16, 16)
    np.savez(path, images=squares)
    with here.client() as client:
        dataset = client.wait_dataset(client.upload_dataset(path, "squares", modality="image").id, 120)
        for name, spec in MODELS.items():
            asked = {**spec, "dataset": dataset.id, "model": name, "steps": 1, "warmup_steps": 0}
            done = client.wait(client.submit({"type": "train", "spec": asked}).id, 300)
            if done.state != "succeeded":
                raise RuntimeError(f"{name}: {done.error}; {last_lines(here.folder / 'logs', 'worker-generate-1')}")


def notes_of(here: House, job_ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """By job and kind of report: when its runner first said it, in seconds of the machine's clock."""
    found: dict[str, dict[str, float]] = {job_id: {} for job_id in job_ids}
    for line in here.notes.read_text().splitlines():
        note = json.loads(line)
        if note["job_id"] in found:
            found[note["job_id"]][note["said"]] = note["at"]
    return found


def fsync_ms(folder: Path, times: int = 50) -> float:
    """How long the disk takes to keep 8 KiB: what a durable commit cannot be faster than, alone."""
    took: list[float] = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(times):
            file.write(bytes(8192))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return 1000 * statistics.median(took)
