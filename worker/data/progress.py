"""One scale of progress for a whole ingestion, whatever its phases count."""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol, TypeVar

STEPS: Final = 1000
"""The whole job; phases count files, members or bytes, which are of no use to somebody who waits."""

ItemT = TypeVar("ItemT")


class Steps(Protocol):
    """The part of ``worker.run.Run`` that is told about progress."""

    def phase(self, name: str) -> None: ...

    def step(self, step: int, steps: int, **values: float) -> None: ...


class Progress:
    """Maps phases onto the scale. Each report may raise ``worker.run.Stopped``."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._start = 0
        self._end = 0

    def phase(self, name: str, until: int) -> None:
        """Begin a phase that ends at ``until`` of ``STEPS``."""
        self._start, self._end = self._end, until
        self._steps.phase(name)

    def report(self, done: int, total: int) -> None:
        """Say how much of the phase is done."""
        share = min(1.0, done / total) if total else 1.0
        self._steps.step(self._start + int(share * (self._end - self._start)), STEPS)

    def track(self, items: Sequence[ItemT]) -> Iterator[ItemT]:
        """Iterate, with a report after each item."""
        for number, item in enumerate(items, start=1):
            yield item
            self.report(number, len(items))
