"""Real servers on free ports, and the rules every test lives under.

| fixture | scope | what it is |
|---|---|---|
| ``valkey`` | session | URL of a real Valkey |
| ``broker`` | test | the same URL, emptied before the test |
| ``postgres`` | session | a real PostgreSQL server (``.url_of(name)``) |
| ``database`` / ``module_database`` | test / module | URL of a fresh, migrated database |
| ``empty_database`` | test | URL of a fresh database without tables |
| ``object_store`` | session | a real S3 server |
| ``s3`` / ``module_s3`` | test / module | its endpoint, credentials and a fresh bucket |
| ``wait_until`` | session | poll for a fact with a deadline, instead of sleeping |
"""

import gc
import itertools
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

import psutil
import pytest

from noisemill.local.ports import free_port
from noisemill.local.processes import Part, launch, stop, wait_ready
from noisemill.local.servers import ObjectStore, Postgres, Valkey
from tests.second_trial import pytest_addoption, pytest_collection_finish, pytest_itemcollected

__all__ = ["pytest_addoption", "pytest_collection_finish", "pytest_itemcollected"]

RUN_MARK = "TEST_RUN"
# Every process started by a test inherits it, so that what escapes its parent is still found.
os.environ[RUN_MARK] = secrets.token_hex(8)

# Tiny networks are several times slower on two threads than on one. Through the environment, so
# that the child processes of a test obey too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU, Triton's kernels are interpreted; Triton reads this when it is first imported, by whomever.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A run in the background of a script ignores Ctrl-C, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Settings of the developer's own stack must not leak into a test.
for name in [name for name in os.environ if name.startswith(("NOISEMILL_", "FLOWER_"))]:
    del os.environ[name]

_START_LIMIT = timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Where and how to reach a fresh bucket. Fields are named like ``S3Settings``."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str


T = TypeVar("T")


class WaitUntil(Protocol):
    """Poll ``predicate`` until it returns something true, and return that; fail after ``timeout`` seconds."""

    def __call__(self, predicate: Callable[[], T], timeout: float = 10, every: float = 0.02) -> T: ...


def _wait_until(predicate: Callable[[], T], timeout: float = 10, every: float = 0.02) -> T:
    deadline = time.monotonic() + timeout
    while not (answer := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(
                f"not true within {timeout} s; the last answer was {answer!r}",
                pytrace=True,
            )
        time.sleep(every)
    return answer


@pytest.fixture(scope="session")
def wait_until() -> WaitUntil:
    return _wait_until


@contextmanager
def _running(part: Part, folder: Path) -> Iterator[None]:
    logs = folder / "logs"
    process = launch(part, logs=logs, folder=folder, base_env=os.environ)
    try:
        wait_ready(part, process, logs=logs, limit=_START_LIMIT)
        yield
    finally:
        stop(process, first=part.stop_signal, grace=part.grace)


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    """Where the servers of this run keep their data; not pytest's, which keeps the last three runs."""
    with tempfile.TemporaryDirectory(prefix="noisemill-test-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def valkey(servers_folder: Path) -> Iterator[str]:
    server = Valkey(
        folder=servers_folder / "valkey",
        port=free_port(),
        password=secrets.token_hex(16),
    )
    with _running(server, servers_folder):
        yield server.url


@pytest.fixture
def broker(valkey: str) -> str:
    import redis

    with redis.Redis.from_url(valkey) as client:
        client.flushall()
    return valkey


@pytest.fixture(scope="session")
def postgres(servers_folder: Path) -> Iterator[Postgres]:
    server = Postgres(
        folder=servers_folder / "postgres",
        port=free_port(),
        password=secrets.token_hex(16),
        durable=False,
    )
    with _running(server, servers_folder):
        yield server


_serial = itertools.count(1)


def _admin(postgres: Postgres, statement: str) -> None:
    import psycopg

    url = postgres.url_of("postgres").replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


@contextmanager
def _fresh_database(postgres: Postgres, template: str) -> Iterator[str]:
    name = f"test_{next(_serial)}"
    _admin(postgres, f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield postgres.url_of(name)
    finally:
        # FORCE also ends the sessions of processes that a test killed a moment ago.
        _admin(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def migrated_template(postgres: Postgres) -> str:
    """Name of a migrated database that nobody is connected to: copying it is much faster than migrating."""
    from shared.migrations import migrate

    _admin(postgres, "CREATE DATABASE migrated")
    migrate(postgres.url_of("migrated"))
    gc.collect()  # a connection that is only garbage still counts as a session
    return "migrated"


@pytest.fixture
def database(postgres: Postgres, migrated_template: str) -> Iterator[str]:
    with _fresh_database(postgres, migrated_template) as url:
        yield url


@pytest.fixture(scope="module")
def module_database(postgres: Postgres, migrated_template: str) -> Iterator[str]:
    with _fresh_database(postgres, migrated_template) as url:
        yield url


@pytest.fixture
def empty_database(postgres: Postgres) -> Iterator[str]:
    with _fresh_database(postgres, "template0") as url:
        yield url


@pytest.fixture(scope="session")
def object_store(servers_folder: Path) -> Iterator[ObjectStore]:
    server = ObjectStore(
        folder=servers_folder / "s3",
        port=free_port(),
        access_key=secrets.token_hex(8),
        secret_key=secrets.token_hex(16),
    )
    with _running(server, servers_folder):
        yield server


def _fresh_bucket(store: ObjectStore) -> Bucket:
    bucket = f"test-{next(_serial)}"
    # The server keeps buckets as folders and nothing else; this spares a second of importing boto3.
    (store.folder / bucket).mkdir()
    return Bucket(
        endpoint=store.endpoint,
        access_key=store.access_key,
        secret_key=store.secret_key,
        bucket=bucket,
    )


@pytest.fixture
def s3(object_store: ObjectStore) -> Bucket:
    return _fresh_bucket(object_store)


@pytest.fixture(scope="module")
def module_s3(object_store: ObjectStore) -> Bucket:
    return _fresh_bucket(object_store)


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


# Pools that libraries start once and keep until the interpreter ends.
_LIBRARY_SERVANTS = (
    "resource_tracker",
    "semaphore_tracker",
    "forkserver",
    "compile_worker",
)


def _children() -> set[psutil.Process]:
    """Our own children only: what servers of wider fixtures fork, they also end."""
    alive = set[psutil.Process]()
    for child in psutil.Process().children():
        try:
            servant = any(word in " ".join(child.cmdline()) for word in _LIBRARY_SERVANTS)
            if not servant and child.status() != psutil.STATUS_ZOMBIE:
                alive.add(child)
        except psutil.NoSuchProcess:
            continue
    return alive


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """A test ends the processes that it starts. What wider fixtures started before it does not count."""
    before = _children()
    yield
    # One that was told to end may need a moment.
    _, left = psutil.wait_procs(list(_children() - before), timeout=3)
    if not left:
        return
    seen = [f"{child.pid}: {' '.join(child.cmdline())}" for child in left]
    for child in left:
        child.kill()
    pytest.fail("left behind:\n" + "\n".join(seen), pytrace=False)


@pytest.fixture
def small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the kernel's files say that so many bytes of main memory are left, and nothing of control groups."""
    from worker.engine import memory

    def limit(num_bytes: int) -> None:
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {num_bytes // 1024} kB\n")
        monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
        monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroups")

    return limit


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if any process started by it is still alive, wherever it has hidden."""
    left = [process for process in psutil.process_iter() if _belongs_to_this_run(process)]
    for process in left:
        sys.stderr.write(f"\nstill alive after the last test: {process.pid} {process.name()}\n")
        process.kill()
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _belongs_to_this_run(process: psutil.Process) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        same_run = process.environ().get(RUN_MARK) == os.environ[RUN_MARK]
        return same_run and not any(word in " ".join(process.cmdline()) for word in _LIBRARY_SERVANTS)
    except psutil.Error:
        return False
