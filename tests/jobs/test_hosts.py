"""One training on several hosts: it is the one it would be, whoever comes, and whoever goes costs a retry at most."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from pydantic import SecretStr, ValidationError

from noisemill.local.ports import free_port
from shared.errors import WorkerLost
from shared.settings import S3Settings, WorkerSettings
from shared.storage import Storage
from tests.conftest import Bucket
from tests.jobs.conftest import DATASET_ID
from tests.jobs.folder_run import FolderRun
from tests.jobs.test_crew import FP32, weights
from worker import gathering
from worker.channel import Channel
from worker.gathering import Gathering, Hello, Refused, dial, proof, split
from worker.jobs.crew import versions
from worker.jobs.train import train
from worker.run import Stopped

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).parents[2]
SECRET = "one that nobody guesses"
TrainRun = Callable[..., FolderRun]
StartMember = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def leader(address: str) -> Gathering:
    return Gathering(address, SECRET, expected=1)


@pytest.fixture
def storage(s3: Bucket) -> Storage:
    about = {"endpoint": s3.endpoint, "bucket": s3.bucket, "access_key": s3.access_key}
    return Storage(S3Settings(**about, secret_key=SecretStr(s3.secret_key)))


@pytest.fixture
def start_member(
    s3: Bucket, storage: Storage, dataset: dict[str, Any], address: str, tmp_path: Path
) -> Iterator[StartMember]:
    """Start a host that helps; the data is in storage."""
    for file in dataset["files"]:
        storage.put(file["key"], (tmp_path / file["key"]).read_bytes(), media_type="x/y")
    names = ("endpoint", "bucket", "access_key", "secret_key")
    common = {f"NOISEMILL_S3_{name.upper()}": str(getattr(s3, name)) for name in names}
    common |= {"NOISEMILL_DATABASE_URL": "postgresql://not-used"}
    common |= {"NOISEMILL_BROKER_URL": "redis://not-used", "NOISEMILL_WORKER_DEVICE": "cpu"}
    common |= {"NOISEMILL_WORKER_TRAIN_ADDRESS": address, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:

        def start(name: str = "helper", *, secret: str = SECRET, **variables: str) -> subprocess.Popen[bytes]:
            own = {"NOISEMILL_WORKER_CACHE_DIR": str(tmp_path / name), "NOISEMILL_WORKER_TRAIN_SECRET": secret}
            log = stack.enter_context((tmp_path / f"{name}.log").open("ab"))
            command = [sys.executable, "-m", "worker.member"]
            process = subprocess.Popen(command, env=os.environ | common | own | variables, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start


def log_of(tmp_path: Path, name: str = "helper") -> str:
    return (tmp_path / f"{name}.log").read_text()


def waits(leader: Gathering, num: int = 1) -> None:
    """Until so many members have dialled in."""
    deadline = time.monotonic() + 60
    while leader.num_waiting < num:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def led(make: TrainRun, leader: Gathering, **spec: Any) -> FolderRun:
    run = make(**FP32, **spec)
    run.gathering = leader
    return run


def test_two_hosts_train_what_a_host_with_two_devices_does(
    train_run: TrainRun, leader: Gathering, start_member: StartMember
) -> None:
    here = train_run(**FP32)
    here.num_devices = 2
    train(here)
    start_member()
    waits(leader)

    both = led(train_run, leader)
    result = train(both)

    assert result["fingerprint"]["num_processes"] == 2
    assert both.logs == ["Training with 2 processes, on 2 hosts."]
    expected = weights(here)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(both).items())


def test_members_of_several_devices_share_a_training_with_those_of_the_leader(
    train_run: TrainRun, leader: Gathering, start_member: StartMember
) -> None:
    alone = train_run(**FP32)
    train(alone)
    start_member("one", NOISEMILL_WORKER_TRAIN_DEVICES="2")
    start_member("other")
    waits(leader, 2)
    run = led(train_run, leader)
    run.num_devices = 2

    result = train(run)

    assert result["fingerprint"]["num_processes"] == 5
    expected = weights(alone)
    assert all(torch.allclose(tensor, expected[name], atol=1e-3) for name, tensor in weights(run).items())


def test_a_member_helps_with_one_training_after_another_also_under_another_leader(
    train_run: TrainRun, address: str, start_member: StartMember
) -> None:
    """As after the runner was replaced."""
    member = start_member()
    code = f"from worker.gathering import *; import time; Gathering({address!r}, {SECRET!r}); time.sleep(1000)"
    before = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not any(one.status == "ESTABLISHED" for one in psutil.Process(member.pid).net_connections()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before.kill()
    before.wait()
    leader = Gathering(address, SECRET, expected=1)

    results = [train(led(train_run, leader)) for _ in range(2)]

    assert [result["fingerprint"]["num_processes"] for result in results] == [2, 2]


def test_a_member_that_dies_ends_the_attempt_and_the_next_goes_on_without_it(
    train_run: TrainRun, leader: Gathering, start_member: StartMember
) -> None:
    member = start_member()
    waits(leader)
    broken = led(train_run, leader)
    its = psutil.Process(member.pid)

    def die(kind: str) -> None:
        if kind == "checkpoint":
            children.extend(its.children(recursive=True))
            member.kill()

    children: list[psutil.Process] = []
    broken.before_publish = die
    with pytest.raises(WorkerLost, match="died"):
        train(broken)

    _, alive = psutil.wait_procs(children, timeout=10)
    again = led(train_run, Gathering(), resume=[broken] if broken.checkpoints() else [])
    result = train(again)

    assert children
    assert alive == []
    assert result["fingerprint"]["num_processes"] == 1


def test_what_a_member_runs_ends_when_its_leader_hangs_up(
    train_run: TrainRun, leader: Gathering, start_member: StartMember
) -> None:
    member = start_member()
    waits(leader)
    run = led(train_run, leader)
    run.stop_at = (3, "interrupt")
    with pytest.raises(Stopped):
        train(run)

    children = psutil.Process(member.pid).children(recursive=True)
    _, alive = psutil.wait_procs(children, timeout=10)
    waits(leader)
    resumed = led(train_run, leader, resume=[run])
    straight = led(train_run, leader)
    train(resumed)
    train(straight)

    assert alive == []
    expected = weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_a_member_that_hangs_is_left_out(
    train_run: TrainRun, leader: Gathering, start_member: StartMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "SILENCE", 1.0)
    member = start_member()
    waits(leader)
    member.send_signal(signal.SIGSTOP)
    began = time.monotonic()

    result = train(run := led(train_run, leader))

    assert time.monotonic() - began < 30
    assert result["fingerprint"]["num_processes"] == 1
    assert run.logs == []


def test_a_member_that_cannot_fetch_the_data_is_left_out(
    train_run: TrainRun,
    leader: Gathering,
    start_member: StartMember,
    s3: Bucket,
    dataset: dict[str, Any],
    tmp_path: Path,
) -> None:
    start_member()
    waits(leader)
    settings = S3Settings(
        endpoint=s3.endpoint, bucket=s3.bucket, access_key=s3.access_key, secret_key=SecretStr(s3.secret_key)
    )
    Storage(settings).delete([dataset["files"][0]["key"]])

    result = train(led(train_run, leader))

    assert result["fingerprint"]["num_processes"] == 1
    assert "cannot help" in log_of(tmp_path)


def test_who_does_not_know_the_secret_is_not_asked(
    train_run: TrainRun, leader: Gathering, start_member: StartMember, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "SILENCE", 1.0)
    start_member(secret="another that nobody guesses")
    deadline = time.monotonic() + 60
    while "cannot reach" not in log_of(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    assert train(led(train_run, leader))["fingerprint"]["num_processes"] == 1


def test_who_only_claims_to_know_the_secret_is_not_welcome(leader: Gathering, address: str) -> None:
    _dialled(address, Hello("first", 1, "cpu", versions())).release()
    stranger = Channel(socket.create_connection(split(address)))
    nonce = (stranger.receive(5) or {})["nonce"]
    hello = Hello("h", 1, "cpu", versions())._asdict()

    stranger.send({"type": "answer", "digest": proof(b"a guess", "member", nonce), "nonce": "0", "hello": hello})

    assert stranger.receive(5) is None
    stranger.release()


def test_a_leader_that_only_claims_to_know_the_secret_is_told_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pretender = Thread(target=_pretend, args=(server,))
        pretender.start()

        with pytest.raises(Refused, match="does not know"):
            dial(f"127.0.0.1:{server.getsockname()[1]}", SECRET, Hello("h", 1, "cpu", versions()))
        pretender.join()


def _pretend(server: socket.socket) -> None:
    channel = Channel(server.accept()[0])
    channel.send({"type": "challenge", "nonce": "0"})
    nonce = (channel.receive(5) or {})["nonce"]
    channel.send({"type": "welcome", "digest": proof(b"a guess", "leader", nonce)})
    channel.receive(5)
    channel.release()


@pytest.mark.parametrize("rubbish", [b"", b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[1]\n", b"x" * 100_000, b"\xff\n"])
def test_strangers_keep_nobody_waiting(leader: Gathering, address: str, rubbish: bytes) -> None:
    _dialled(address, Hello("first", 1, "cpu", versions())).release()
    strangers = [socket.create_connection(split(address)) for _ in range(20)]
    for stranger in strangers:
        stranger.sendall(rubbish)
    began = time.monotonic()

    channel = _dialled(address, Hello("h", 1, "cpu", versions()))

    assert time.monotonic() - began < 1
    channel.release()
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("differs", ["kind", "versions"])
def test_a_host_that_would_compute_otherwise_is_told_so(leader: Gathering, address: str, differs: str) -> None:
    hello = Hello(
        "h", 1, "cuda" if differs == "kind" else "cpu", {"torch": "1.0"} if differs == "versions" else versions()
    )
    channel = _dialled(address, hello)
    waits(leader)

    with leader.asked(8, "cpu", {}, versions(), still=lambda: None) as members:
        assert members == []
    assert (channel.receive(5) or {})["type"] == "refused"
    channel.release()


def test_a_training_that_cannot_be_shared_asks_nobody(train_run: TrainRun, leader: Gathering, address: str) -> None:
    channel = _dialled(address, Hello("h", 1, "cpu", versions()))
    waits(leader)
    fields: dict[str, Any] = {"family": "gan", "network": "dcgan", "base_channels": 8, "latent_dim": 4, "steps": 1}
    run = train_run(base={"dataset": DATASET_ID, "model": "m", "batch_size": 16}, **fields)
    run.gathering = leader

    assert train(run)["fingerprint"]["num_processes"] == 1
    assert channel.receive(0.2) is None
    assert leader.num_waiting == 1
    channel.release()


def test_no_more_processes_are_taken_than_can_share_the_training(leader: Gathering, address: str) -> None:
    channels = [_dialled(address, Hello("h", 2, "cpu", versions())) for _ in range(3)]
    for channel in channels:
        channel.send({"type": "ready"})
    waits(leader, 3)

    with leader.asked(3, "cpu", {}, versions(), still=lambda: None) as members:
        assert [member.num_processes for member in members] == [2, 1]
    for channel in channels:
        channel.release()


def test_who_is_canceled_does_not_wait_for_members(train_run: TrainRun, leader: Gathering, address: str) -> None:
    channel = _dialled(address, Hello("h", 1, "cpu", versions()))  # and says nothing more
    waits(leader)

    def canceled() -> None:
        raise Stopped("cancel")

    began = time.monotonic()
    with pytest.raises(Stopped), leader.asked(8, "cpu", {}, versions(), still=canceled):
        pass
    assert time.monotonic() - began < 2
    channel.release()


@pytest.mark.parametrize("given", [{"train_address": "here:1"}, {"train_secret": "0123456789abcdef"}])
def test_address_and_secret_go_together(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="go together"):
        WorkerSettings.model_validate(given)


def _dialled(address: str, hello: Hello) -> Any:
    """A connection, as soon as there is a leader."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return dial(address, SECRET, hello)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
