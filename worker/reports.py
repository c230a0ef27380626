"""What an attempt has to say, on its way into SQL: in order, each report once, together with the heartbeat.

A beat is one statement, whatever it carries. If no answer comes, the same statement is sent again: it names the event
that it follows, so that of two only one is written. Knows nothing of runners.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar

from sqlalchemy.orm import Session

from shared.jobs import attempts
from shared.jobs.attempts import Claim, Progress, Report, Standing

T = TypeVar("T")


class Ask(Protocol):
    """Do one statement; raises ``AWAY`` when nobody knows whether it happened."""

    def __call__(self, statement: Callable[[Session], T], /) -> T: ...


class _Batch(NamedTuple):
    reports: tuple[Report, ...]
    where: Progress | None


class Reports:
    """Of one attempt."""

    def __init__(self, claim: Claim, *, lease: timedelta, ask: Ask) -> None:
        self._claim, self._lease, self._ask = claim, lease, ask
        self._waiting: list[Report] = []
        self._where: Progress | None = None
        self._sent: _Batch | None = None
        self._event_seq: int | None = None

    @property
    def any_left(self) -> bool:
        """Whether something is not in SQL, as far as anybody knows."""
        return bool(self._waiting or self._sent)

    def add(self, type: str, **data: Any) -> None:
        self._waiting.append(Report(type=type, data=data))

    def add_artifact(self, artifact: attempts.NewArtifact) -> None:
        self._waiting.append(Report.of(artifact))

    def add_progress(self, where: Progress) -> None:
        self._where = where
        self._waiting.append(where.as_report())

    def drop(self) -> None:
        """Forget what SQL refuses to take."""
        self._waiting, self._sent = [], None

    def beat(self) -> Standing:
        """Hold the lease and write what waits, or what was sent before and not confirmed.

        Raises:
            LeaseLost: the attempt is over.
        """
        while True:
            if self._sent is not None or self._event_seq is None or not self._waiting:
                standing = self._heartbeat()
                if not self.any_left:
                    return standing
            if self._sent is None:
                self._sent, self._waiting, self._where = _Batch(tuple(self._waiting), self._where), [], None
            if (answer := self._send(self._sent)) is not None:
                return answer

    def _heartbeat(self) -> Standing:
        claim, sent = self._claim, self._sent
        standing = self._ask(lambda s: attempts.heartbeat(s, claim.job_id, claim.fence, lease=self._lease))
        seen = self._event_seq
        if sent is not None and seen is not None and standing.event_seq != seen and self._is_written(sent, after=seen):
            self._sent = None
        self._event_seq = standing.event_seq
        return standing

    def _is_written(self, batch: _Batch, *, after: int) -> bool:
        # An object is never told twice, so it tells nothing where it was known before, and does no harm again.
        sign = next((one for one in batch.reports if one.artifact is None), batch.reports[0])
        return self._ask(lambda s: attempts.is_reported(s, self._claim, sign, after=after))

    def _send(self, batch: _Batch) -> Standing | None:
        how = {"where": batch.where, "after": self._event_seq, "lease": self._lease}
        standing = self._ask(lambda s: attempts.report(s, self._claim, batch.reports, **how))
        if standing is not None:
            self._sent, self._event_seq = None, standing.event_seq
        return standing
