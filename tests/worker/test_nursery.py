"""Where runners come from: a process that forks them, and may die before them."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shared.jobs.state import JobState
from tests.worker.conftest import Workplace
from worker import nursery
from worker.device import GONE, Device
from worker.nursery import Nurseries, Nursery
from worker.supervisor import Supervisor


def program(*acts: str, first: str = "") -> tuple[str, ...]:
    """The command of a nursery that imports ``first``, and whose runners say that they are there and do these."""
    lines = [
        "import json, os, sys, time",
        "from worker.births import Births",
        "from worker.lifeline import ending_with",
        first,
        "birth = Births(listener=int(sys.argv[2]), opener=int(sys.argv[4])).next()",
        "with ending_with(birth.lifeline):",
        "    about = {'type': 'ready', 'device': os.environ.get('SAID_TO_IT', 'cpu')}",
        "    os.write(birth.channel, json.dumps(about).encode() + b'\\n')",
        *(f"    {act}" for act in acts or ["pass"]),
    ]
    return sys.executable, "-c", "\n".join(lines)


def below(name: str, process: psutil.Process | None = None) -> list[psutil.Process]:
    """Descendants of a process that call themselves so and live."""
    found = (process or psutil.Process()).children(recursive=True)
    return [one for one in found if one.name() == name and one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Its runners sleep."""
    monkeypatch.setattr(nursery, "COMMAND", program("time.sleep(600)"))
    device = Device()
    yield device
    device.close()


def up(device: Device) -> psutil.Process:
    """The runner of a device, once it is ready."""
    device.start()
    assert device.ready()
    [runner] = below("runner")
    return runner


def test_how_a_runner_died_is_told_whoever_killed_it_and_however_often_one_asks(device: Device) -> None:
    up(device).send_signal(signal.SIGSEGV)

    assert device.receive(5) is GONE
    assert [device.kill(), device.kill()] == [-signal.SIGSEGV, -signal.SIGSEGV]


def test_the_exit_status_of_a_runner_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "COMMAND", program("os._exit(7)"))
    device = Device()
    assert device.ready()

    assert device.receive(5) is GONE
    assert device.kill() == 7
    device.close()


def test_a_runner_that_hung_up_is_not_taken_for_one_that_lives(device: Device) -> None:
    """It dies a moment after its channel has closed, and who asks in between must not be told that it is up."""
    first = up(device)
    first.kill()
    assert device.receive(5) is GONE

    assert up(device) != first


def test_the_next_runner_comes_of_the_same_nursery(device: Device) -> None:
    up(device)
    [first] = below("nursery")
    device.kill()

    up(device)

    assert below("nursery") == [first]


def test_a_runner_outlives_its_nursery_and_ends_when_it_is_told_to(device: Device) -> None:
    runner = up(device)
    [first] = below("nursery")
    first.kill()
    first.wait(5)
    assert runner.is_running()

    assert device.kill() is None
    _, left = psutil.wait_procs([runner], timeout=5)
    assert not left


def test_a_nursery_that_hangs_keeps_nobody_from_the_next_runner(device: Device) -> None:
    runner = up(device)
    [hung] = below("nursery")
    hung.suspend()
    try:
        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(device.kill)
            with suppress(TimeoutError):
                killed.result(20)
            was_killed = killed.done()
            with suppress(psutil.NoSuchProcess):
                hung.resume()

        assert was_killed
        assert not psutil.wait_procs([runner], timeout=5)[1]
        assert up(device) != runner
    finally:
        with suppress(psutil.NoSuchProcess):
            hung.resume()


def test_a_supervisor_whose_nursery_was_killed_opens_one(workplace: Workplace) -> None:
    opened = Nursery()
    device = Device(Nurseries(opened.address))
    supervisor = Supervisor(workplace.settings, workplace.engine, device, lock_file=workplace.folder / "lock")
    ours = psutil.Process(opened._process.pid)  # pyright: ignore[reportPrivateUsage]
    assert device.ready()
    assert below("runner", ours)

    ours.kill()
    opened.close()
    device.kill()
    job_id = workplace.job(["steps", 1, 0.0])
    supervisor.settings = workplace.settings
    supervisor.queues = ["generate"]
    supervisor.run_next()

    assert workplace.state(job_id) == JobState.SUCCEEDED
    device.close()


def test_a_runner_is_never_born_that_nobody_wants_any_more(device: Device, tmp_path: Path, wait_until) -> None:
    """Its nursery still imports when it is told so."""
    born = tmp_path / "born"
    acts = f"open({str(born)!r}, 'a').write('x')", "time.sleep(600)"
    nursery.COMMAND = program(*acts, first="time.sleep(1)")  # the fixture puts it back
    device.start()
    device.kill()

    up(device)

    assert wait_until(born.exists)
    assert born.read_text() == "x"


def test_what_a_runner_started_dies_with_it(workplace: Workplace, wait_until) -> None:
    job_id = workplace.job(["fork"], ["hang", 600], max_attempts=1)
    supervisor = workplace.supervisor()
    workplace.background(supervisor.run_next)
    said = wait_until(lambda: [e.data["message"] for e in workplace.events(job_id) if e.type == "job.log"], timeout=60)
    runner, forked = (psutil.Process(int(pid)) for pid in said[0].split()[1:])

    runner.kill()

    _, left = psutil.wait_procs([forked], timeout=5)
    assert not left


def test_a_runner_has_the_environment_of_its_supervisor(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    up(device)
    device.kill()
    monkeypatch.setenv("SAID_TO_IT", "since the nursery was opened")

    up(device)

    assert device.name == "since the nursery was opened"


def test_a_nursery_ends_with_whoever_opened_it_and_leaves_nothing(tmp_path: Path, wait_until) -> None:
    opens = "print(nursery.Nursery().address, flush=True); input()"
    opening = f"from worker import nursery; nursery.COMMAND = {program()!r}; {opens}"
    opener = subprocess.Popen(
        [sys.executable, "-c", opening],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    with opener:
        assert opener.stdout is not None
        address = Path(opener.stdout.readline().strip())
        [opened] = wait_until(lambda: below("nursery"), timeout=30)
        assert address.exists()

        opener.kill()

        opened.wait(5)
    assert not list(tmp_path.iterdir())


def test_a_nursery_can_be_called_however_long_the_name_of_the_folder_for_temporary_files_is(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    assert up(device)


def test_a_nursery_has_one_thread_when_it_forks_and_nothing_of_cuda(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is safe to be forked: a thread that held a lock is not there to give it back."""
    program = """
import os, signal
from worker import births, runner
fork = os.fork

def checked():
    import torch
    pid = fork()
    if pid and (torch.cuda.is_initialized() or len(os.listdir("/proc/self/task")) != 1):
        os.kill(pid, signal.SIGKILL)
    return pid

births.os.fork = checked
runner.main()
"""
    monkeypatch.setattr(nursery, "COMMAND", (sys.executable, "-c", program))
    device = Device()

    try:
        assert device.ready()
    finally:
        device.close()
