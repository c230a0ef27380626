"""The process that owns the device. Runs one job after another, or several that share it, and keeps models warm.

Forked of a nursery (``worker/births.py``), which is this program until it has imported what runners need, and in its
own process group. It talks to the supervisor over a channel and to storage, never to SQL or the broker. When the
supervisor dies, its whole group is killed (``worker/lifeline.py``); when the channel alone closes, by itself.

Says: ready, room, model, phase, step, moved, metrics, log, artifact, done, failed, stopped, parted. Hears: run, stop.
"""

import argparse
import gc
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any, Final, Literal, TypeVar

from shared.errors import (
    InputGone,
    InputUnreadable,
    StorageAway,
    StorageError,
    StorageUnavailable,
    TransferFailed,
    UploadFailed,
)
from shared.jobs.keys import artifact_key
from shared.jobs.state import JobType
from shared.settings import Settings, WorkerSettings
from shared.storage import DigestMismatch, ObjectMissing, Storage
from worker.births import Births
from worker.cache import ObjectCache
from worker.channel import Channel, Message
from worker.code_cache import CodeCache
from worker.failures import disk_failed, told
from worker.gathering import Gathering
from worker.jobs import executor, server
from worker.lifeline import ending_with
from worker.pace import Pace
from worker.run import Assignment, Desk, InputDamaged, Parted, Run, Stopped, StopReason, StoredObject, most_urgent

logger = logging.getLogger(__name__)

_REPORT_EVERY = 0.2
"""Seconds between two ``step`` messages; the supervisor commits far less often."""
_MOVED_EVERY = 1.0
"""Seconds between two ``moved`` messages while bytes go to storage or come from there."""
AHEAD: Final = (JobType.GENERATE, JobType.TRAIN)
"""Types whose executors are imported before there is a runner."""
STORAGE_PATIENCE: Final = 120.0
"""Seconds that an attempt waits for storage to come back before the job waits without a device."""
PARTING_PATIENCE: Final = 10.0
"""Seconds that an attempt which was told to stop still tries to store what it leaves behind; not when canceled."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
"""Seconds before the second try, doubled for each further one up to the longest; shortened by chance."""
_READS_OF_DAMAGED: Final = 3
"""Times that an object is read before it is taken for damaged: a wire may flip bits, too."""
T = TypeVar("T")


class RunnerRun:
    """``worker.run.Run`` for one attempt."""

    def __init__(self, runner: "Runner", assignment: Assignment) -> None:
        self._runner = runner
        self._assignment = assignment
        self._pace = Pace()
        self._reported = self._moved_at = 0.0
        self._values: Mapping[str, float] = {}
        self._stop_reason: StopReason | None = None
        self._leave_by = float("inf")
        self._unwanted = Event()

    @property
    def assignment(self) -> Assignment:
        return self._assignment

    @property
    def device(self) -> str:
        return self._runner.device

    @property
    def devices(self) -> Sequence[str]:
        return self._runner.devices

    @property
    def gathering(self) -> Gathering:
        return self._runner.gathering

    @property
    def feature_networks(self) -> Path | None:
        return self._runner.feature_networks

    @property
    def code_cache(self) -> CodeCache:
        return self._runner.code_cache

    def found_model(self, *, was_loaded: bool) -> None:
        self._runner.channel.send({"type": "model", "was_loaded": was_loaded})

    def stop(self, reason: StopReason) -> None:
        """Ask the attempt to stop; called from another thread. A later reason counts if it is more urgent."""
        reason = most_urgent(self._stop_reason, reason)
        if reason == self._stop_reason:
            return
        self._stop_reason = reason
        if reason != "preempt":
            self._leave_by = time.monotonic() + (0 if reason == "cancel" else PARTING_PATIENCE)
            self._unwanted.set()

    def phase(self, name: str) -> None:
        self._say("phase", phase=name)

    def step(self, step: int, steps: int, **values: float) -> None:
        now = time.monotonic()
        if self._pace.is_behind(step):  # the training went back to a checkpoint
            self._pace = Pace()
        self._pace.tick(step, now)
        self._values = values or self._values  # a step without figures, as while measuring, hides none
        if now - self._reported >= _REPORT_EVERY or step == steps:
            self._reported = now
            self._say("step", step=step, steps=steps, figures={**self._values, **self._pace.figures(step, steps)})
        if self._unwanted.is_set():
            self.boundary()

    def boundary(self) -> None:
        if self._stop_reason is not None:
            raise Stopped(self._stop_reason)

    def metrics(self, step: int, split: Literal["train", "held_out"], values: Mapping[str, float]) -> None:
        self._say("metrics", step=step, split=split, values=dict(values))

    def log(self, message: str) -> None:
        self._say("log", message=message)

    def publish(
        self, kind: str, name: str, body: bytes | Path, *, media_type: str, metadata: Mapping[str, Any] | None = None
    ) -> StoredObject:
        key = artifact_key(self._assignment.job_id, self._assignment.fence, name)
        try:
            stored = self._patiently(
                lambda: self._runner.storage.put(key, body, media_type=media_type, moved=self._moved),
                leaving=kind == "checkpoint",
            )
        except StorageError as error:
            how = StorageUnavailable if isinstance(error, StorageAway) else UploadFailed
            raise how(f"{name} could not be stored: {error}") from error
        result = StoredObject(key=key, sha256=stored.sha256, size_bytes=stored.size_bytes)
        artifact = {"kind": kind, "name": name, "media_type": media_type, "details": dict(metadata or {})}
        self._say("artifact", artifact=artifact | result.as_json())
        return result

    def fetch(self, stored: StoredObject) -> Path:
        try:
            return self._patiently(lambda: self._runner.cache.fetch(stored, moved=self._moved))
        except ObjectMissing as error:  # waiting does not bring it back
            raise InputGone(str(error)) from error
        except DigestMismatch as error:
            raise InputDamaged(f"SHA-256 {error.found}, expected {error.expected}") from error
        except StorageAway as error:
            raise StorageUnavailable(str(error)) from error
        except StorageError as error:
            raise InputUnreadable(str(error)) from error
        except OSError as error:
            raise disk_failed(error) from error

    def _moved(self) -> None:
        """Bytes have moved; called from several threads."""
        now = time.monotonic()
        if now - self._moved_at >= _MOVED_EVERY:
            self._moved_at = now
            self._say("moved")

    def _patiently(self, act: Callable[[], T], *, leaving: bool = False) -> T:
        """What ``act`` returns once storage answers; raises ``Stopped`` when that is no longer wanted.

        ``leaving``: it stores what the next attempt goes on from, so that a stop does not end the wait at once.
        """
        give_up, tries = time.monotonic() + STORAGE_PATIENCE, 0
        while True:
            tries += 1
            try:
                return act()
            except DigestMismatch:
                if tries >= _READS_OF_DAMAGED:
                    raise
            except TransferFailed as error:
                if time.monotonic() > give_up:
                    raise
                logger.warning("waiting for storage: %s", error)
            self._wait(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (tries - 1)) * random.uniform(0.5, 1), leaving=leaving)

    def _wait(self, seconds: float, *, leaving: bool) -> None:
        if self._unwanted.wait(seconds):
            if not leaving or time.monotonic() > self._leave_by:
                self.boundary()
            time.sleep(min(seconds, _FIRST_PAUSE))

    def _say(self, kind: str, **content: Any) -> None:
        self._runner.channel.send({"type": kind, **self._assignment.attempt, **content})


class Runner:
    """Hears assignments, runs them, and says how they went."""

    def __init__(self, settings: Settings, channel: Channel) -> None:
        self.channel = channel
        self.storage = Storage(settings.s3)
        self.cache = ObjectCache(settings.worker.cache_dir, self.storage, limit_bytes=settings.worker.cache_bytes)
        self.code_cache = CodeCache(settings.worker.cache_dir / "code", limit_bytes=settings.worker.code_bytes)
        self.device = choose_device(settings.worker)
        self.devices = devices_from(self.device, settings.worker.train_devices)
        self.gathering = gathering_of(settings.worker)
        self.feature_networks = settings.worker.feature_networks
        self._runs: dict[tuple[str, int], RunnerRun] = {}
        self.num_begun = 0
        """Jobs begun so far."""
        self._work: deque[Assignment] = deque()
        self._has_work = Condition()

    def serve(self) -> None:
        """Run jobs until the supervisor is gone; does not return."""
        Thread(target=self._listen, name="listen", daemon=True).start()
        self.channel.send({"type": "ready", "device": self.device})
        while True:
            with self._has_work:
                self._has_work.wait_for(lambda: self._work)
                kind = self._work[0].type
            serve = server(kind)
            if serve is None:
                [run] = self.begin(kind, most=1)
                self.settle(run, lambda run=run, kind=kind: executor(kind)(run))
            else:
                self._serve_together(kind, serve)

    def _serve_together(self, kind: str, serve: Callable[[Desk], None]) -> None:
        try:
            serve(_SharedDesk(self, kind))
        except BaseException as error:  # noqa: BLE001  (whatever it was, the supervisor must hear of it)
            runs = list(self._runs.values())
            traceback.print_exception(error)
            for run in runs:
                self.settle(run, partial(_raise, error if len(runs) == 1 else Parted()))

    def begin(self, kind: str, most: int | None = None) -> "list[RunnerRun]":
        """The jobs of this type that wait at the head of the line; from now on they hear what they are told."""
        begun: list[RunnerRun] = []
        with self._has_work:
            while self._work and self._work[0].type == kind and len(begun) != most:
                begun.append(RunnerRun(self, self._work.popleft()))
        self.num_begun += len(begun)
        self._runs |= {_name(run.assignment): run for run in begun}
        return begun

    def settle(self, run: Run, result: Callable[[], dict[str, Any]]) -> None:
        """Say how the attempt ended: with what ``result`` returns or raises."""
        try:
            ending: Message = {"type": "done", "result": result()}
        except Stopped as stopped:
            ending = {"type": "stopped", "reason": stopped.reason}
        except Parted:
            ending = {"type": "parted"}
        except BaseException as error:  # noqa: BLE001  (as above)
            ending = {"type": "failed"} | told(error)
        del self._runs[_name(run.assignment)]
        self.channel.send({**run.assignment.attempt, **ending})

    def _listen(self) -> None:
        for message in self.channel.messages():
            self._hear(message)
        # The supervisor is gone, and with it the lease: nothing this process does can count.
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def _hear(self, message: Message) -> None:
        match message["type"]:
            case "run":
                with self._has_work:
                    self._work.append(Assignment(**message["assignment"]))
                    self._has_work.notify()
            case "stop":
                run = self._runs.get((message["job_id"], message["fence"]))
                if run is not None:
                    run.stop(message["reason"])
            case _:
                logger.warning("ignored message %s", message["type"])


class _SharedDesk:
    """``worker.run.Desk`` for the jobs of one type."""

    def __init__(self, runner: Runner, kind: str) -> None:
        self._runner, self._kind = runner, kind
        self._told: tuple[int, int] | None = None

    @property
    def device(self) -> str:
        return self._runner.device

    def arrivals(self) -> "Sequence[Run]":
        return self._runner.begin(self._kind)

    def room(self, samples: int) -> None:
        if (samples, self._runner.num_begun) != self._told:
            self._told = samples, self._runner.num_begun
            self._runner.channel.send({"type": "room", "samples": samples, "begun": self._runner.num_begun})

    def settle(self, run: Run, result: Callable[[], dict[str, Any]]) -> None:
        self._runner.settle(run, result)


def _name(assignment: Assignment) -> tuple[str, int]:
    return assignment.job_id, assignment.fence


def _raise(error: BaseException) -> Any:
    raise error


def choose_device(settings: Any) -> str:
    """The torch device of this runner, with the CPU threads it may use and the room that models have on it."""
    import torch

    from worker.engine.models import MODELS

    MODELS.limit_bytes = settings.model_bytes
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.device != "auto":
        return str(settings.device)
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def gathering_of(settings: WorkerSettings) -> Gathering:
    """Where other hosts dial in, if it is to be led from here."""
    if settings.train_address is None or settings.train_secret is None:
        return Gathering()
    secret = settings.train_secret.get_secret_value()
    return Gathering(settings.train_address, secret, expected=settings.train_members)


def devices_from(first: str, num: int) -> list[str]:
    """So many devices of the kind of the first; a CPU is one, whose cores the processes share."""
    kind, _, index = first.partition(":")
    return [first if kind == "cpu" else f"{kind}:{int(index or 0) + place}" for place in range(num)]


def import_ahead() -> None:
    """Import what jobs will most likely need, while there is none."""
    gc.disable()  # all of it stays: looking for garbage among it takes a tenth of the time
    for kind in AHEAD:
        with suppress(ImportError):  # the job that needs it will say so
            if server(kind.value) is None:
                executor(kind.value)
    gc.freeze()  # and would stop steps for a quarter of a second
    gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, required=True, help="inherited socket at which runners are asked for")
    parser.add_argument("--opener", type=int, required=True, help="inherited pipe: the nursery ends with it")
    options = parser.parse_args()
    import_ahead()
    Storage(Settings.read().s3)  # has what takes longest read once for all runners
    # Returns in each runner; signals are its supervisor's to handle, and ignored since it was part of the nursery.
    birth = Births(listener=options.calls, opener=options.opener).next()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s runner %(levelname)s %(message)s")
    with ending_with(birth.lifeline):
        Runner(Settings.read(), Channel.from_fd(birth.channel)).serve()


if __name__ == "__main__":
    main()
