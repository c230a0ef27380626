"""The local stack: started twice, killed, raced, taken down. Real servers; stand-ins for the rest."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
import redis

from noisemill.local import LocalError, Stack
from noisemill.local.ports import free_port
from noisemill.local.servers import ObjectStore, Postgres
from noisemill.local.services import Services, Wiring
from tests.local.stand_ins import never_ready_services, small_services

# A second or two each, and there are many of them.
pytestmark = pytest.mark.slow

PARTS = ["postgres", "valkey", "s3", "api", "worker-train-1"]

StackFactory = Callable[..., Stack]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make_stack(tmp_path: Path, said: list[str]) -> Iterator[StackFactory]:
    """Stacks on one data folder, as separate calls of the command line would make them."""

    def make(folder: Path = tmp_path / "data", **options: Any) -> Stack:
        made.append(Stack(folder, say=said.append, **{"services": small_services, **options}))
        return made[-1]

    made: list[Stack] = []
    yield make
    for stack in made:
        stack.down()


@pytest.fixture
def given_servers(valkey: str, postgres: Postgres, object_store: ObjectStore) -> dict[str, str]:
    return {
        **os.environ,
        "NOISEMILL_DATABASE_URL": postgres.url,
        "NOISEMILL_BROKER_URL": valkey,
        "NOISEMILL_S3_ENDPOINT": object_store.endpoint,
        "NOISEMILL_S3_ACCESS_KEY": object_store.access_key,
        "NOISEMILL_S3_SECRET_KEY": object_store.secret_key,
    }


@pytest.fixture
def make_small_stack(make_stack: StackFactory, given_servers: dict[str, str]) -> StackFactory:
    """The same without servers of its own, for facts that do not depend on them."""
    return partial(make_stack, environ=given_servers)


def pids(stack: Stack) -> dict[str, int]:
    return (stack.info() or {"pids": {}})["pids"]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def query(stack: Stack, statement: str) -> list[tuple[object, ...]]:
    info = stack.info()
    assert info is not None
    with psycopg.connect(info["database_url"].replace("+psycopg", "")) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def test_stack_json_names_every_process_once_and_every_address(make_stack: StackFactory) -> None:
    info = make_stack().up()

    assert list(info["pids"]) == PARTS
    assert all(psutil.pid_exists(pid) for pid in info["pids"].values())
    assert info.keys() >= {"api_url", "api_key", "flower_url", "database_url", "broker_url"}
    assert info["s3"].keys() == {"endpoint", "bucket", "access_key", "secret_key"}


def test_only_the_owner_can_read_the_files_that_hold_secrets(make_small_stack: StackFactory) -> None:
    stack = make_small_stack()
    stack.up()

    modes = {name: (stack.data_dir / name).stat().st_mode & 0o777 for name in ("stack.json", "secrets.json")}

    assert modes == {"stack.json": 0o600, "secrets.json": 0o600}


def test_a_second_up_changes_nothing_and_says_so(make_small_stack: StackFactory, said: list[str]) -> None:
    first = make_small_stack().up()

    second = make_small_stack().up()

    assert second == first
    assert said[-1] == "everything is already running"


def test_up_after_a_crash_starts_only_what_is_missing_and_data_are_intact(make_stack: StackFactory) -> None:
    stack = make_stack()
    before = stack.up()["pids"]
    query(stack, "CREATE TABLE kept AS SELECT 1")
    os.kill(before["postgres"], signal.SIGKILL)

    after = make_stack().up()["pids"]

    assert {name for name in PARTS if after[name] != before[name]} == {"postgres"}
    assert query(stack, "SELECT * FROM kept") == [(1,)]


def test_everything_killed_comes_back_with_the_same_key_ports_and_data(make_stack: StackFactory) -> None:
    stack = make_stack()
    before = stack.up()
    query(stack, "CREATE TABLE kept AS SELECT 1")
    with redis.Redis.from_url(before["broker_url"]) as client:
        client.set("kept", "yes")
        client.waitaof(1, 0, 2000)
    for pid in before["pids"].values():
        os.kill(pid, signal.SIGKILL)

    after = make_stack().up()

    addresses = [key for key in before if key not in ("pids", "processes")]
    assert {key: after[key] for key in addresses} == {key: before[key] for key in addresses}
    assert query(stack, "SELECT * FROM kept") == [(1,)]
    with redis.Redis.from_url(after["broker_url"]) as client:
        assert client.get("kept") == b"yes"


def test_what_a_killed_worker_left_behind_is_gone_before_it_starts_again(
    make_small_stack: StackFactory, wait_until: Any
) -> None:
    stack = make_small_stack()
    worker = psutil.Process(stack.up()["pids"]["worker-train-1"])
    [runner] = wait_until(worker.children)
    worker.kill()

    make_small_stack().up()

    assert not is_alive(runner)


def test_down_ends_every_process_and_forgets_them(make_stack: StackFactory, wait_until: Any) -> None:
    stack = make_stack()
    family = [psutil.Process(pid) for pid in stack.up()["pids"].values()]
    wait_until(family[-1].children)
    family += [child for process in family for child in process.children(recursive=True)]

    stopped = make_stack().down()

    assert stopped == PARTS
    psutil.wait_procs(family, timeout=5)
    assert [process for process in family if is_alive(process)] == []
    assert not (stack.data_dir / "stack.json").exists()


def test_down_without_a_stack_is_no_error(make_stack: StackFactory) -> None:
    assert make_stack().down() == []


def test_down_stops_the_users_of_a_part_before_the_part(make_stack: StackFactory, said: list[str]) -> None:
    make_stack().up()

    make_stack().down()

    stops = [line.split()[0] for line in said if line.endswith("stopped")]
    assert stops == ["worker-train-1", "api", "s3", "valkey", "postgres"]


def test_a_process_that_got_the_pid_of_a_dead_part_is_left_alone(make_small_stack: StackFactory) -> None:
    stack = make_small_stack()
    info = stack.up()
    os.kill(info["pids"]["api"], signal.SIGKILL)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        info["processes"]["api"]["pid"] = info["pids"]["api"] = bystander.pid
        (stack.data_dir / "stack.json").write_text(json.dumps(info))

        stopped = make_small_stack().down()

        assert "api" not in stopped
        assert bystander.poll() is None
        bystander.kill()


def test_two_ups_at_once_start_one_stack(make_stack: StackFactory, said: list[str]) -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda stack: stack.up(), [make_stack(), make_stack()])

    assert first == second
    assert sorted(line.split()[0] for line in said if "started" in line) == sorted(PARTS)


def test_two_stacks_that_start_at_once_have_ports_of_their_own(make_small_stack: StackFactory, tmp_path: Path) -> None:
    """Each would like the usual one, and finds it free until the other listens."""
    with ThreadPoolExecutor(2) as threads:
        stacks = [make_small_stack(tmp_path / name) for name in ("one", "other")]
        one, other = threads.map(lambda stack: stack.up(), stacks)

    assert one["api_url"] != other["api_url"]


def test_a_very_long_path_of_the_data_folder_is_no_obstacle(make_stack: StackFactory, tmp_path: Path) -> None:
    """Unix sockets in it would not be: their paths are limited to 107 bytes."""
    stack = make_stack(tmp_path / ('"deep" ' * 10) / ("er" * 30))

    stack.up()

    assert query(stack, "SELECT 1") == [(1,)]


def test_a_part_whose_way_to_start_changed_is_started_again(make_small_stack: StackFactory) -> None:
    before = make_small_stack().up()["pids"]

    after = make_small_stack().up(port=free_port())["pids"]

    assert {name for name in after if after[name] != before[name]} == {"api", "worker-train-1"}


def test_a_server_given_in_the_environment_replaces_the_embedded_one(make_stack: StackFactory, valkey: str) -> None:
    stack = make_stack(environ={**os.environ, "NOISEMILL_BROKER_URL": valkey})

    info = stack.up()

    assert "valkey" not in info["pids"]
    assert info["broker_url"] == valkey


def test_an_s3_endpoint_without_keys_is_refused_by_name(make_stack: StackFactory) -> None:
    stack = make_stack(environ={**os.environ, "NOISEMILL_S3_ENDPOINT": "http://127.0.0.1:1"})

    with pytest.raises(LocalError, match="NOISEMILL_S3_ACCESS_KEY and NOISEMILL_S3_SECRET_KEY"):
        stack.up()


def test_a_port_that_is_taken_is_refused_before_anything_starts(make_small_stack: StackFactory, valkey: str) -> None:
    taken = urlsplit(valkey).port or 0
    stack = make_small_stack()

    with pytest.raises(LocalError, match=f"Port {taken} is in use"):
        stack.up(port=taken)

    assert pids(stack) == {}


def test_when_something_cannot_start_all_that_was_started_before_it_is_stopped(make_stack: StackFactory) -> None:
    def with_a_broken_setup(wiring: Wiring) -> Services:
        return replace(small_services(wiring), setup=[sys.executable, "-c", "raise SystemExit('no schema')"])

    stack = make_stack(services=with_a_broken_setup)

    with pytest.raises(LocalError, match=r"setup failed[\s\S]*no schema"):
        stack.up()

    assert pids(stack) == {}


def test_in_the_foreground_a_crashed_part_is_started_again_and_that_is_said(
    make_small_stack: StackFactory, said: list[str], wait_until: Any
) -> None:
    stack = make_small_stack()
    before = stack.up()["pids"]["worker-train-1"]
    watcher = threading.Thread(target=stack.watch)
    watcher.start()
    os.kill(before, signal.SIGKILL)

    wait_until(lambda: pids(stack).get("worker-train-1") not in (None, before))
    make_small_stack().down()
    watcher.join(timeout=10)

    assert any(line.startswith("worker-train-1 has ended; starting it again") for line in said)
    assert said[-1] == "the stack was taken down"


@contextmanager
def foreground(folder: Path, services: str, environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """``noisemill up`` without ``--detach``, in a process of its own."""
    command = [sys.executable, "-m", "tests.local.stand_ins", str(folder), services]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_the_foreground_every_way_to_be_ended_ends_the_stack(
    make_small_stack: StackFactory, given_servers: dict[str, str], number: signal.Signals
) -> None:
    stack = make_small_stack()
    with foreground(stack.data_dir, small_services.__name__, given_servers) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line == "everything is running\n")
        family = [psutil.Process(pid) for pid in pids(stack).values()]

        process.send_signal(number)

        assert process.wait(timeout=20) == 0
        assert [part for part in family if is_alive(part)] == []


def test_an_up_that_is_interrupted_while_it_waits_leaves_nothing_running(
    make_small_stack: StackFactory, given_servers: dict[str, str]
) -> None:
    stack = make_small_stack()
    with foreground(stack.data_dir, never_ready_services.__name__, given_servers) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("worker-train-1 started"))
        family = [psutil.Process(pid) for pid in pids(stack).values()]

        process.send_signal(signal.SIGINT)

        assert process.wait(timeout=20) == 0
        assert [part for part in family if is_alive(part)] == []


def test_in_the_foreground_a_stack_that_already_runs_is_left_to_itself(
    make_small_stack: StackFactory, given_servers: dict[str, str]
) -> None:
    stack = make_small_stack()
    before = stack.up()

    with foreground(stack.data_dir, small_services.__name__, given_servers) as process:
        said, _ = process.communicate(timeout=20)

    assert (process.returncode, said) == (0, "everything is already running\n")
    assert stack.info() == before
