"""What a generate job has finished, for the attempt that comes after one that broke off. Knows no network.

Every few seconds, and where the attempt has to leave, the list of the samples that are stored becomes a checkpoint of
the job. A later attempt that computes in the same way carries them on, and publishes them as its own once the rest is
drawn; one that computes otherwise draws all, since a result has one fingerprint. Lists only get longer.
"""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, Final

from shared.errors import InputGone, InputUnreadable
from worker.jobs.inputs import stored
from worker.run import Run, StoredObject

EVERY: Final = 10.0
"""Seconds between two lists."""
LEAVING: Final = 5.0
"""Seconds that an attempt which has to leave waits at most for its last list."""

LOST: Final = (InputGone, InputUnreadable)
"""Why a sample has to be drawn again."""

List = Callable[[], tuple[Mapping[str, Any], Mapping[int, StoredObject]]]
"""Gives the fingerprint of what was computed so far, and the samples that are stored, by index."""


def fetch_kept(run: Run) -> None:
    """Download the list that earlier attempts have left, if it is there."""
    _record(run)


def num_kept(run: Run) -> int:
    """How many samples earlier attempts have left, however they were computed."""
    return len(_samples(_record(run)))


def kept(run: Run, fingerprint: Mapping[str, Any]) -> dict[int, StoredObject]:
    """Samples that an earlier attempt with this ``fingerprint`` has left, by index.

    Whether they are intact is seen when they are fetched (``LOST``).
    """
    record = _record(run)
    return _samples(record) if record.get("fingerprint") == json.loads(json.dumps(fingerprint)) else {}


class Keeper:
    """Stores the lists of one attempt, by the thread that stores its samples."""

    def __init__(self, run: Run, storing: Executor) -> None:
        self._run, self._storing = run, storing
        self._listed_at, self._num_listed = time.monotonic(), num_kept(run)
        self._listing: Future[None] | None = None

    def keep(self, num_done: int, list_all: List) -> None:
        """Begin to store a list, where one is due."""
        is_busy = self._listing is not None and not self._listing.done()
        if num_done > self._num_listed and not is_busy and time.monotonic() >= self._listed_at + EVERY:
            self._listing = self._storing.submit(self._publish, list_all)

    def leave(self, list_all: List) -> None:
        """Store a list now. The samples behind the last one are drawn again if that cannot be done."""
        with suppress(Exception):
            self._storing.submit(self._publish, list_all).result(LEAVING)

    def _publish(self, list_all: List) -> None:
        fingerprint, samples = list_all()
        if len(samples) <= self._num_listed:
            return
        record = {"fingerprint": fingerprint, "samples": {index: one.as_json() for index, one in samples.items()}}
        name, about = f"samples-{len(samples):06d}.json", {"step": len(samples), "keep": 1}
        body = json.dumps(record).encode()
        self._run.publish("checkpoint", name, body, media_type="application/json", metadata=about)
        self._listed_at, self._num_listed = time.monotonic(), len(samples)


def _record(run: Run) -> Mapping[str, Any]:
    """The last list, or nothing."""
    for found in run.assignment.inputs.get("resume", [])[:1]:
        with suppress(*LOST):
            return json.loads(run.fetch(stored(found)).read_bytes())
    return {}


def _samples(record: Mapping[str, Any]) -> dict[int, StoredObject]:
    return {int(index): stored(one) for index, one in record.get("samples", {}).items()}
