"""The three embedded servers: private, and none the worse for a ``kill -9``."""

import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
import redis

from noisemill.local.ports import free_port
from noisemill.local.processes import (
    Part,
    PartFailed,
    Process,
    launch,
    stop,
    wait_ready,
    wait_stopped,
)
from noisemill.local.root import unprivileged
from noisemill.local.servers import ObjectStore, Postgres, Valkey

LIMIT = timedelta(seconds=30)


def start(part: Part, folder: Path) -> Process:
    process = launch(part, logs=folder / "logs", folder=folder, base_env=os.environ)
    wait_ready(part, process, logs=folder / "logs", limit=LIMIT)
    return process


def end(part: Part, process: Process) -> None:
    stop(process, first=part.stop_signal, grace=part.grace)


@contextmanager
def running(part: Part, folder: Path) -> Iterator[Process]:
    process = start(part, folder)
    try:
        yield process
    finally:
        end(part, process)


def valkey_in(folder: Path) -> Valkey:
    return Valkey(folder=folder / "valkey", port=free_port(), password="v-secret")


def postgres_in(folder: Path) -> Postgres:
    return Postgres(folder=folder / "postgres", port=free_port(), password="p-secret")


def port_of(url: str) -> int:
    return urlsplit(url).port or 0


def rows(server: Postgres, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def test_valkey_refuses_a_client_without_its_password(valkey: str) -> None:
    stranger = valkey.replace(valkey.split("@", maxsplit=1)[0], "redis://").replace("@", "")

    with (
        redis.Redis.from_url(stranger) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_valkey_refuses_to_forget_when_its_memory_is_full(valkey: str) -> None:
    with redis.Redis.from_url(valkey) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_valkey_keeps_its_queue_through_a_kill(tmp_path: Path) -> None:
    server = valkey_in(tmp_path)
    killed = start(server, tmp_path)
    with redis.Redis.from_url(server.url) as client:
        client.rpush("queue", "job")
        client.waitaof(1, 0, 2000)
    os.kill(killed.pid, signal.SIGKILL)
    assert wait_stopped(killed, timedelta(seconds=10))

    with running(server, tmp_path), redis.Redis.from_url(server.url) as client:
        assert client.lrange("queue", 0, -1) == [b"job"]


def test_valkey_shows_its_password_on_no_command_line(tmp_path: Path) -> None:
    server = valkey_in(tmp_path)

    with running(server, tmp_path) as process:
        assert server.password not in " ".join(psutil.Process(process.pid).cmdline())
        assert (server.folder / "valkey.conf").stat().st_mode & 0o777 == 0o600


def test_every_server_listens_on_the_loopback_interface_only(
    valkey: str, postgres: Postgres, object_store: ObjectStore
) -> None:
    ports = {
        int(valkey.rsplit(":", maxsplit=1)[-1].split("/", maxsplit=1)[0]),
        postgres.port,
        object_store.port,
    }

    listening = {
        tuple(connection.laddr)
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert {address for address in listening if address[-1] in ports} == {("127.0.0.1", port) for port in ports}


def test_postgres_refuses_a_wrong_password(postgres: Postgres) -> None:
    url = postgres.url.replace(postgres.password, "wrong").replace("+psycopg", "")

    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url)


def test_postgres_does_not_run_as_root(postgres: Postgres) -> None:
    pid = int((postgres.data / "postmaster.pid").read_text().split()[0])

    assert psutil.Process(pid).uids().effective != 0


def test_postgres_keeps_committed_rows_when_all_its_processes_are_killed(
    tmp_path: Path,
) -> None:
    server = postgres_in(tmp_path)
    postmaster = psutil.Process(start(server, tmp_path).pid)
    rows(server, "CREATE TABLE jobs AS SELECT 7 AS id")
    for process in [postmaster, *postmaster.children(recursive=True)]:
        process.kill()

    with running(server, tmp_path):
        assert rows(server, "SELECT id FROM jobs") == [(7,)]


def test_postgres_starts_while_backends_of_its_killed_predecessor_still_live(
    tmp_path: Path,
) -> None:
    """They hold the shared memory of the cluster, and a new server refuses to start beside them."""
    server = postgres_in(tmp_path)
    postmaster = psutil.Process(start(server, tmp_path).pid)
    [checkpointer] = [p for p in postmaster.children() if "checkpointer" in " ".join(p.cmdline())]
    checkpointer.suspend()
    postmaster.kill()

    with running(server, tmp_path):
        assert rows(server, "SELECT 1") == [(1,)]


def test_postgres_starts_although_another_program_has_the_pid_of_its_stale_lock(tmp_path: Path) -> None:
    """PostgreSQL itself believes any program of its own user to be the server that it looks for."""
    server = postgres_in(tmp_path)
    ended = start(server, tmp_path)
    lock = (server.data / "postmaster.pid").read_text()
    end(server, ended)
    account = unprivileged()
    with subprocess.Popen(["sleep", "600"], user=account.uid if account else None) as bystander:
        (server.data / "postmaster.pid").write_text(lock.replace(str(ended.pid), str(bystander.pid), 1))

        with running(server, tmp_path):
            assert rows(server, "SELECT 1") == [(1,)]
            assert bystander.poll() is None
        bystander.kill()


def test_postgres_makes_its_cluster_again_when_the_first_try_was_interrupted(
    tmp_path: Path,
) -> None:
    server = postgres_in(tmp_path)
    (server.folder / "unfinished" / "base").mkdir(parents=True)

    with running(server, tmp_path):
        assert rows(server, "SELECT 1") == [(1,)]


def test_the_object_store_serves_a_put_object_to_the_holder_of_its_keys(s3) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    client.put_object(Bucket=s3.bucket, Key="a/b", Body=b"bytes")
    link = client.generate_presigned_url("get_object", Params={"Bucket": s3.bucket, "Key": "a/b"})

    with urllib.request.urlopen(link) as answer:
        assert answer.read() == b"bytes"


def test_a_server_that_cannot_start_fails_with_the_end_of_its_log(tmp_path: Path, valkey: str) -> None:
    taken = port_of(valkey)
    server = Valkey(folder=tmp_path / "valkey", port=taken, password="another")

    with pytest.raises(PartFailed, match=r"valkey: ended while starting[\s\S]*Address already in use"):
        start(server, tmp_path)
