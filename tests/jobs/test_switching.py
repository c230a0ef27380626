"""Trainings whose blocks are compiled meanwhile: nothing waits or fails for it, and no moment decides about bytes."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import WaitUntil
from tests.jobs.conftest import SPEC, LeftBehind
from tests.jobs.folder_run import FolderRun
from worker.code_cache import CodeCache
from worker.engine.checkpoint import read_tensors
from worker.engine.training import Trainer
from worker.jobs import compiler, train
from worker.jobs.switching import Switch
from worker.jobs.train import train as execute
from worker.run import Stopped, StopReason

CONV = {**SPEC, "network": "conv", "base_channels": 8, "precision": "fp32", "channels_last": False}
ENDLESS = ("/bin/sh", "-c", "sleep 1000")
SWITCHED_AT = 5


class Killed(BaseException):
    """As if the process were gone."""


class MortalRun(FolderRun):
    """A run that dies after a step, without a last word."""

    die_at = 0
    stop_waiting: StopReason | None = None
    compiled: Path | None = None

    @property
    def code_cache(self) -> CodeCache:
        """One for several tests, if they say so: compiling takes most of their time."""
        return CodeCache(self.compiled or self.folder / "code", limit_bytes=2**30)

    def step(self, step: int, steps: int, **values: float) -> None:
        super().step(step, steps, **values)
        if self.stop_waiting is not None and self.phases[-1] == "compiling":
            raise Stopped(self.stop_waiting)
        if values and step == self.die_at:
            raise Killed


Runs = Callable[..., MortalRun]


@pytest.fixture
def conv_run(train_run: Callable[..., FolderRun]) -> Runs:
    def make(*, die_at: int = 0, compiled: Path | None = None, **given: Any) -> MortalRun:
        made = train_run(base=CONV, **given)
        run = MortalRun(folder=made.folder, assignment=made.assignment)
        run.die_at, run.compiled = die_at, compiled
        return run

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled") / "code"


@pytest.fixture
def plain(conv_run: Runs) -> str:
    """What the training comes to that nothing is compiled for."""
    run = conv_run()
    return weights(run, execute(run))


def weights(run: FolderRun, result: dict[str, Any]) -> str:
    """A digest of what was learned, whatever was asked for."""
    tensors, _ = read_tensors(run.folder / result["weights"]["key"])
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_training_ends_while_its_blocks_are_still_being_compiled(
    conv_run: Runs, plain: str, monkeypatch: pytest.MonkeyPatch, left_behind: LeftBehind
) -> None:
    monkeypatch.setattr(compiler, "COMMAND", ENDLESS)
    run = conv_run(compiled_from="auto")

    result = execute(run)

    assert weights(run, result) == plain
    assert result["reproducibility"] == "none"
    assert left_behind() == []


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("/bin/false",), "ended with 1"),
        (("/bin/sh", "-c", "kill -SEGV $$"), "ended with -11"),
        (("/bin/sh", "-c", "echo no room; exit 0"), "no room"),
        (("/bin/true",), "not what was compiled"),
        (("/no/such/python",), "No such file"),
    ],
)
@pytest.mark.parametrize("compiled_from", [3, "auto"])
def test_what_cannot_be_compiled_is_told_once_and_costs_nothing_else(
    conv_run: Runs,
    plain: str,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    reason: str,
    compiled_from: Any,
) -> None:
    monkeypatch.setattr(compiler, "COMMAND", command)
    run = conv_run(compiled_from=compiled_from)

    result = execute(run)

    assert weights(run, result) == plain
    assert [line for line in run.logs if "compiled" in line and reason in line] == run.logs[:1]
    assert result["reproducibility"] == "none"


def test_a_compilation_that_takes_too_long_is_ended(
    conv_run: Runs, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "COMMAND", ENDLESS)
    monkeypatch.setattr(compiler, "PATIENCE", 0.3)
    run = conv_run(compiled_from=2)

    assert weights(run, execute(run)) == plain
    assert "took more than" in run.logs[0]
    assert run.phases == ["loading_data", "training", "compiling", "training", "evaluating", "uploading"]


@pytest.mark.parametrize("reason", ["cancel", "pause"])
def test_a_training_that_waits_for_its_code_can_be_stopped(
    conv_run: Runs, monkeypatch: pytest.MonkeyPatch, left_behind: LeftBehind, reason: Any
) -> None:
    monkeypatch.setattr(compiler, "COMMAND", ENDLESS)
    run = conv_run(compiled_from=2)
    run.stop_waiting = reason

    with pytest.raises(Stopped):
        execute(run)

    assert [one.metadata["step"] for one in run.artifacts("checkpoint")] == ([2] if reason == "pause" else [])
    assert left_behind() == []


def test_several_devices_share_a_training_that_is_not_compiled(conv_run: Runs) -> None:
    run = conv_run(compiled_from=2, steps=3)
    run.num_devices = 2

    result = execute(run)

    assert "several devices" in run.logs[0]
    assert result["reproducibility"] == "none"


@pytest.mark.slow
def test_a_machine_without_a_compiler_trains_by_plain_code(
    conv_run: Runs, plain: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    run = conv_run(compiled_from=2)

    result = execute(run)

    assert weights(run, result) == plain
    assert "Nothing is compiled" in run.logs[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_switches_at_its_step_has_the_same_bytes_whenever_it_was_killed(
    conv_run: Runs, plain: str, folder: Path
) -> None:
    asked = {"compiled_from": SWITCHED_AT, "compiled": folder}
    straight = conv_run(**asked)
    result = execute(straight)
    broken = list[MortalRun]()
    for die_at in (4, SWITCHED_AT, 8):
        broken.append(conv_run(**asked, checkpoint_every=2, resume=broken[:], die_at=die_at))
        # At the very step of the switch it is stopped, and leaves a checkpoint.
        if die_at == SWITCHED_AT:
            broken[-1].stop_at = (SWITCHED_AT, "interrupt")
        with pytest.raises((Killed, Stopped)):
            execute(broken[-1])

    again = execute(conv_run(**asked, checkpoint_every=2, resume=broken))

    assert weights(straight, again) == weights(straight, result) != plain
    assert result["fingerprint"]["switched_at"] == again["fingerprint"]["switched_at"] == [SWITCHED_AT]
    assert result["reproducibility"] == again["reproducibility"] == "same_hardware"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_switch_that_came_by_chance_is_made_again_by_who_goes_on(
    conv_run: Runs, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Killed at the first compiled step: the switch was stored before, and the code is waited for after."""

    class AtItsStep(Switch):
        def is_made(self, trainer: Trainer[Any, Any]) -> bool:
            while trainer.step == SWITCHED_AT and self._compiler is not None and not self._compiler.is_done:
                time.sleep(0.05)
            return trainer.step >= SWITCHED_AT and super().is_made(trainer)

    monkeypatch.setattr(train, "Switch", AtItsStep)
    asked = {"compiled_from": "auto", "compiled": folder, "checkpoint_every": 100}
    straight = conv_run(**asked)
    result = execute(straight)
    broken = conv_run(**asked, die_at=SWITCHED_AT + 1)
    with pytest.raises(Killed):
        execute(broken)

    again = execute(conv_run(**asked, resume=[broken]))

    assert weights(straight, again) == weights(straight, result)
    assert again["fingerprint"]["switched_at"] == result["fingerprint"]["switched_at"] == [SWITCHED_AT]
    assert again["reproducibility"] == result["reproducibility"] == "none"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compilation_ends_with_the_process_that_wanted_it(tmp_path: Path, wait_until: WaitUntil) -> None:
    """With the compiler that it has started, too; killed as a supervisor kills, nobody is left to say so."""
    slow = tmp_path / "g++"
    slow.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 1000\n")
    slow.chmod(0o755)
    code = f"import sys; sys.argv = ['', {str(tmp_path)!r}]; from tests.jobs.test_switching import start; start()"
    environment = {**os.environ, "CXX": str(slow)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True) as owner:
        wait_until((tmp_path / "pids").exists, timeout=500)
        owner.send_signal(signal.SIGKILL)

    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: not any(is_running(pid) for pid in pids), timeout=60)


def start() -> None:
    """Begin to compile a small network's blocks, and wait for the end."""
    from tests.engine.test_blocks import calls_of, trainer_of

    trainer = trainer_of("vae")
    cache = CodeCache(Path(sys.argv[1]) / "code", limit_bytes=2**30)
    about = ("training", trainer.spec, trainer.data, trainer.numerics, calls_of(trainer), cache)
    compiler.Compiler(compiler.order_of(*about) | {"device": "cpu"})
    time.sleep(1000)
