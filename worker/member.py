"""``python -m worker.member``: a host that helps the worker at ``NOISEMILL_WORKER_TRAIN_ADDRESS`` with its trainings.

It claims nothing and stores nothing: it dials, waits until it is asked, fetches the data, and has its processes do what
the training's first one orders (``worker/jobs/crew.py``). When the leader hangs up they are killed, and it dials anew.
Needs storage, no database and no broker.
"""

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, Final, NoReturn

from shared.errors import StorageError
from shared.settings import Settings, WorkerSettings
from shared.storage import Storage
from worker.cache import ObjectCache
from worker.channel import Channel, Message
from worker.gathering import Hello, Refused, dial
from worker.jobs.crew import start_process, versions
from worker.jobs.inputs import stored
from worker.runner import choose_device, devices_from

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0
"""Seconds between two calls, doubled while nobody answers."""
_MOVED_EVERY: Final = 1.0
"""Seconds between two signs of life while bytes come from storage."""


class MemberProcess:
    """One host's part."""

    def __init__(self, settings: Settings, devices: Sequence[str]) -> None:
        worker = settings.worker
        self._address, self._secret = _whom_to_help(worker)
        self._devices = devices
        self._hello = Hello(socket.gethostname(), len(devices), devices[0].partition(":")[0], versions())
        self._cache = ObjectCache(worker.cache_dir, Storage(settings.s3), limit_bytes=worker.cache_bytes)

    def serve(self) -> NoReturn:
        """Help with one training after another."""
        pause, told = _FIRST_PAUSE, ""
        while True:
            try:
                channel = dial(self._address, self._secret, self._hello)
            except (OSError, Refused, ValueError, KeyError) as error:
                if told != (told := str(error)):
                    logger.warning("cannot reach %s, trying on: %s", self._address, error)
                time.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                logger.info("waiting to be asked by %s", self._address)
                pause, told = _FIRST_PAUSE, ""
                try:
                    self._help(channel)
                finally:
                    channel.release()
                time.sleep(_FIRST_PAUSE)

    def _help(self, channel: Channel) -> None:
        """See one training through."""
        files: dict[str, dict[str, Path]] = {}
        with ExitStack() as stack:
            while (told := channel.receive()) is not None:
                match told["type"]:
                    case "prepare":
                        try:
                            files = self._fetch(told["datasets"], channel)
                        except (StorageError, OSError) as error:
                            logger.warning("cannot help: %s", error)
                            channel.send({"type": "failed", "why": str(error)})
                        else:
                            channel.send({"type": "ready"})
                    case "join":
                        self._join(told, files, channel, stack)
                    case _:
                        logger.warning("not needed: %s", told.get("why", told["type"]))

    def _fetch(self, datasets: Mapping[str, Any], channel: Channel) -> dict[str, dict[str, Path]]:
        said_at = 0.0

        def moved() -> None:
            nonlocal said_at
            if time.monotonic() - said_at >= _MOVED_EVERY:
                said_at = time.monotonic()
                channel.send({"type": "moved"})

        return {
            name: {file["name"]: self._cache.fetch(stored(file), moved=moved) for file in dataset["files"]}
            for name, dataset in datasets.items()
        }

    def _join(self, told: Message, files: Mapping[str, Mapping[str, Path]], channel: Channel, stack: ExitStack) -> None:
        common = {name: told[name] for name in ("meeting", "size", "spec", "num_threads")} | {"files": files}
        for rank, device in zip(told["ranks"], self._devices, strict=False):
            process = stack.enter_context(_alone(common | {"rank": rank, "device": device}))
            # The leader hears of its death by the end of the connection.
            Thread(target=_close_after, args=(process, channel), daemon=True).start()


@contextmanager
def _alone(orders: Mapping[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, killed with all that it started at the end of the block or of this process."""
    theirs, ours = os.pipe()
    try:
        # It inherits what it must read from; our end is the only other one.
        with start_process({**orders, "lifeline": theirs}, start_new_session=True, pass_fds=[theirs]) as process:
            os.close(theirs)
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(ours)


def _close_after(process: subprocess.Popen[str], channel: Channel) -> None:
    process.wait()
    channel.close()


def _whom_to_help(settings: WorkerSettings) -> tuple[str, str]:
    if settings.train_address is None or settings.train_secret is None:
        raise SystemExit("NOISEMILL_WORKER_TRAIN_ADDRESS and NOISEMILL_WORKER_TRAIN_SECRET say whom to help")
    return settings.train_address, settings.train_secret.get_secret_value()


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s member %(levelname)s %(message)s")
    settings = Settings.read()
    MemberProcess(settings, devices_from(choose_device(settings.worker), settings.worker.train_devices)).serve()


if __name__ == "__main__":
    main()
