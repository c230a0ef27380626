"""Whether leases that ran out mean anything: not after a time in which nobody could renew them.

While SQL is away, all leases run out, and they do at once when the database's clock is put forward. Afterwards whoever
comes back first would decide, and end attempts whose workers live and are about to renew them or to hand them back.
"""

import time
from datetime import datetime, timedelta
from typing import Self


class Continuity:
    """Of what one process sees of SQL, each time that it does its round."""

    def __init__(self, *, gap: timedelta, patience: timedelta) -> None:
        """After a ``gap`` between two rounds, or a longer one, leases mean nothing for as long as ``patience``."""
        self._gap, self._patience = gap, patience
        self._seen: tuple[datetime, float] | None = None
        self._unbroken_from = float("-inf")

    @classmethod
    def of(cls, *, tick: timedelta, lease: timedelta) -> Self:
        """For rounds that come every ``tick``, of jobs that are held under a ``lease``."""
        return cls(gap=max(lease / 2, tick * 3), patience=lease)

    def see(self, now: datetime, last_round: datetime | None) -> bool:
        """SQL answers again: by its clock it is ``now``, and at ``last_round`` somebody did one, whoever it was.

        Returns:
            Whether leases that ran out mean something.
        """
        at = time.monotonic()
        if self._seen is not None:
            then, seen_at = self._seen
            gap = max(now - then, timedelta(seconds=at - seen_at))
        else:
            gap = timedelta(0) if last_round is None else now - last_round
        if gap >= self._gap:
            self._unbroken_from = at + self._patience.total_seconds()
        self._seen = now, at
        return at >= self._unbroken_from
