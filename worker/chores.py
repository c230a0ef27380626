"""What housekeeping collects. A chore finds what is due, and does it: bounded, and by several at once if need be.

Objects are deleted between two transactions, never within one. Being cut off anywhere costs only that the rest is
found again; what may be deleted at all, and why that is safe, is in ``shared/jobs/garbage.py``.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy.orm import Session

from shared.errors import StorageAway, StorageError
from shared.jobs import garbage, keys, retention
from shared.settings import Settings
from shared.storage import Listed, Storage, Unfinished

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH: Final = 1000
"""Things in one transaction, and keys in one listing or deletion."""
BATCHES: Final = 50
"""Most batches of one chore in one round."""


class Transact(Protocol):
    """Does its argument in one transaction of its own."""

    def __call__(self, work: Callable[[Session], T], /) -> T: ...


class Chore(Protocol):
    """One kind of housekeeping."""

    @property
    def name(self) -> str: ...

    def find(self) -> Iterable[dict[str, Any]]:
        """All that is due now. Changes nothing."""
        ...

    def do(self) -> Counter[str]:
        """Do a round of it; returns how much of what was done."""
        ...


class Rows:
    """Rows that are kept for a while (``shared/jobs/retention.py``)."""

    def __init__(self, duty: retention.Duty | retention.LogDuty | retention.UsageDuty, transact: Transact) -> None:
        self.name = duty.name
        self._duty = duty
        self._transact = transact

    def find(self) -> Iterable[dict[str, Any]]:
        return self._transact(self._duty.find)

    def do(self) -> Counter[str]:
        done = Counter[str]()
        for _ in range(BATCHES):
            rows = self._transact(partial(self._duty.do, limit=BATCH))
            if not rows:
                break
            done["rows"] += rows
        return done


class Removed:
    """Objects of artifacts that were removed: expired, superseded, erased. Links to them have run out."""

    name = "removed"

    def __init__(self, settings: Settings, storage: Storage, transact: Transact) -> None:
        self._age = settings.s3.link_lifetime
        self._storage = storage
        self._transact = transact

    def find(self) -> Iterable[dict[str, Any]]:
        found = self._transact(partial(garbage.removed, age=self._age))
        return [{"id": artifact, "key": key} for artifact, key in found.items()]

    def do(self) -> Counter[str]:
        done = Counter[str]()
        for _ in range(BATCHES):
            found = self._transact(partial(garbage.removed, age=self._age, limit=BATCH))
            if not found:
                break
            self._storage.delete(found.values())
            self._transact(partial(garbage.deleted, artifacts=found.keys()))
            done["deleted"] += len(found)
        return done


class Orphans:
    """Objects that no row names: marked in one round, deleted in a later one if nothing has changed."""

    name = "orphans"

    def __init__(self, settings: Settings, storage: Storage, transact: Transact) -> None:
        self._grace = settings.jobs.orphan_grace
        self._rest = settings.worker.collect
        self._storage = storage
        self._transact = transact
        self._after = ""
        """Key at which the last round left off."""
        self._strange = 0

    def find(self) -> Iterable[dict[str, Any]]:
        for batch in _batches(self._walk("")):
            unnamed = self._transact(partial(garbage.unnamed, listed=_aged(batch), age=self._grace))
            for listed in batch:
                if listed.key in unnamed:
                    yield listed._asdict() | {"marked_at": unnamed[listed.key]}

    def do(self) -> Counter[str]:
        return Counter(deleted=self._delete(), marked=self._mark())

    def _delete(self) -> int:
        count = 0
        for _ in range(BATCHES):
            condemned = self._transact(partial(garbage.condemned, age=self._rest, limit=BATCH))
            if not condemned:
                break
            self._storage.delete(condemned)
            self._transact(partial(garbage.forget, keys=condemned))
            count += len(condemned)
        return count

    def _mark(self) -> int:
        """Look at the next part of the bucket, and from its beginning after its end."""
        count, seen, strange = 0, 0, 0
        for batch in _batches(islice(self._walk(self._after), BATCH * BATCHES)):
            count += self._transact(partial(garbage.mark, listed=_aged(batch), age=self._grace))
            strange += sum(keys.origin(listed.key) is None for listed in batch)
            seen, self._after = seen + len(batch), batch[-1].key
        if seen < BATCH * BATCHES:
            self._after = ""
        if strange > self._strange:
            logger.warning("%d objects have keys that are not ours: they are left alone", strange)
        self._strange = strange
        return count

    def _walk(self, after: str) -> Iterator[Listed]:
        for prefix in keys.PREFIXES:
            if after < prefix or after.startswith(prefix):
                yield from self._storage.list(prefix, after=after if after.startswith(prefix) else "")


class Uploads:
    """Uploads in parts that were begun by attempts which are over, and never ended."""

    name = "uploads"

    def __init__(self, settings: Settings, storage: Storage, transact: Transact) -> None:
        self._grace = settings.jobs.orphan_grace
        self._storage = storage
        self._transact = transact
        self._told = False

    def find(self) -> Iterable[dict[str, Any]]:
        return [upload._asdict() for upload in self._due()]

    def do(self) -> Counter[str]:
        done = Counter[str]()
        for upload in islice(self._due(), BATCH):
            self._storage.abort(upload)
            done["aborted"] += 1
        return done

    def _due(self) -> Iterator[Unfinished]:
        for batch in _batches(self._listed()):
            aged = [(upload.key, upload.begun_at) for upload in batch]
            over = self._transact(partial(garbage.over, listed=aged, age=self._grace))
            yield from (upload for upload in batch if upload.key in over)

    def _listed(self) -> Iterator[Unfinished]:
        try:
            for prefix in keys.PREFIXES:
                yield from self._storage.unfinished(prefix)
        except StorageAway:
            raise
        except StorageError as error:
            if not self._told:
                logger.warning("storage cannot list unfinished uploads; they are left to it: %s", error)
            self._told = True


def chores(settings: Settings, storage: Storage, transact: Transact) -> list[Chore]:
    """All of them, in an order in which one may make work for the next."""
    rows = [Rows(duty, transact) for duty in retention.duties(settings.jobs)]
    return [*rows, *(kind(settings, storage, transact) for kind in (Removed, Orphans, Uploads))]


def _aged(batch: Iterable[Listed]) -> list[garbage.Aged]:
    return [(listed.key, listed.modified_at) for listed in batch]


def _batches(things: Iterable[T]) -> Iterator[list[T]]:
    things = iter(things)
    while batch := list(islice(things, BATCH)):
        yield batch
