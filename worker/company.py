"""The attempts that have the runner at one time: who joins, who hears what, and what each has had of the device.

Most have it for themselves. Those of a kind that shares it (``Claim.company``) are joined by more of their kind while
the runner has room, for a time slice even past what else waits and is not more urgent, and afterwards as long as
nothing else waits.
"""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from shared.database import AWAY
from shared.jobs.attempts import Claim
from worker.channel import Message
from worker.device import GONE
from worker.watch import Watch

if TYPE_CHECKING:
    from worker.supervisor import Supervisor

logger = logging.getLogger(__name__)

LARGEST: Final = 64
"""Attempts at one time."""


class Held(NamedTuple):
    """A claim, and a moment (monotonic seconds) at which its lease had not begun to run yet."""

    claim: Claim
    asked_at: float


class Company:
    """Sees attempts through, from the first claim until nobody is left."""

    def __init__(self, supervisor: "Supervisor", first: Sequence[Held], *, slice_ends: float) -> None:
        self._supervisor, self._device = supervisor, supervisor.device
        self._first = first
        self._kind = first[0].claim.company
        self._slice_ends = slice_ends
        self._watches: dict[tuple[str, int], Watch] = {}
        self._room = 0
        self._look_at = 0.0
        self._counted_at = first[0].asked_at
        self._is_tainted = False

    @property
    def are_several(self) -> bool:
        return len(self._at_work) > 1

    @property
    def _at_work(self) -> list[Watch]:
        """Those that the runner still has; the end of the others is only to be told to SQL."""
        return [watch for watch in self._watches.values() if not (watch.over or watch.is_done)]

    def see_through(self) -> None:
        """Run all of them; afterwards each has ended in SQL, or its lease runs out by itself."""
        try:
            self._join(self._first)
            while self._watches:
                self._listen()
                self._beat()
                self._invite()
        except BaseException:
            # Nobody would hear any more what the runner does.
            self._device.kill()
            raise
        finally:
            for watch in self._watches.values():
                watch.close()
        if self._is_tainted:
            # Nobody foresaw that error, so nobody knows what it left behind: a broken CUDA context stays broken.
            self._device.kill()
        if not self._supervisor.draining.is_set():
            self._device.start()

    def _join(self, held: Sequence[Held]) -> None:
        if self._watches:
            self._count()
        for claim, asked_at in held:
            watch = Watch(self._supervisor, claim, asked_at=asked_at, company=self)
            self._watches[_name(watch.attempt)] = watch
            watch.begin()
            self._supervisor.ring(claim.job_id, begins=True)

    def _listen(self) -> None:
        """Wait for the runner, at most until something is due."""
        due = min(watch.next_beat for watch in self._watches.values())
        if self._may_grow or self._supervisor.is_in_doubt:
            due = min(due, self._look_at)
        message = self._device.receive(due - time.monotonic())
        self._count()
        if message is GONE:
            was_shared = self.are_several
            for watch in list(self._watches.values()):
                watch.runner_gone(was_shared=was_shared)
        elif message is not None:
            self._pass_on(message)
        self._see_off()

    def _pass_on(self, message: Message) -> None:
        if message["type"] == "room":
            # Those on their way have not been counted by the runner yet.
            self._room = message["samples"] if message["begun"] == self._device.num_assigned else 0
            self._look_at = 0.0
        elif message["type"] == "model":
            self._device.model_hits += message["was_loaded"]
            self._device.model_misses += not message["was_loaded"]
        # Of an attempt that is over, a thread may still have spoken.
        elif (watch := self._watches.get(_name(message))) is not None:
            watch.hear(message)

    def _beat(self) -> None:
        self._count()
        for watch in list(self._watches.values()):
            if time.monotonic() >= watch.next_beat:
                watch.beat()
        self._see_off()

    def _see_off(self) -> None:
        """Let go of who is over."""
        for name, watch in list(self._watches.items()):
            self._is_tainted |= watch.is_unforeseen
            if watch.over:
                self._count()
                del self._watches[name]
                watch.close()

    def _count(self) -> None:
        """Charge the time since the last count to those who had the device, in equal parts."""
        now, at_work = time.monotonic(), self._at_work
        for watch in at_work:
            watch.seconds += (now - self._counted_at) / len(at_work)
        self._counted_at = now

    @property
    def _may_grow(self) -> bool:
        is_wanted = self._kind is not None and not self._is_tainted and not self._supervisor.draining.is_set()
        has_room = (self._room > 0 and not self._device.is_killed) or self._supervisor.is_in_doubt
        # A runner that is dead has nobody at work, and would never tell those who join.
        return is_wanted and has_room and bool(self._at_work) and len(self._watches) < LARGEST

    def _invite(self) -> None:
        """Have more join, where they can; what was claimed without our knowing it has to be found in any case."""
        is_due = bool(self._watches) and time.monotonic() >= self._look_at
        if not is_due or not (self._may_grow or self._supervisor.is_in_doubt):
            return
        settings = self._supervisor.settings.worker
        self._look_at = time.monotonic() + (settings.look if self._may_grow else settings.beat).total_seconds()
        try:
            held = self._claim_more()
        except AWAY as error:
            logger.warning("could not claim company: %s", str(error).splitlines()[0])
            return
        # The runner says anew what room there is once it has begun them.
        self._room = 0 if held else self._room
        self._join(held)

    def _claim_more(self) -> list[Held]:
        """Claim what can share the device with those that are there."""
        if self._kind is None or not self._may_grow:
            self._supervisor.hand_back_doubtful()
            return []
        return self._supervisor.claim_company(
            self._kind,
            room=max(0, min(self._room, LARGEST - len(self._watches))),
            others_wait=time.monotonic() < self._slice_ends,
        )


def _name(attempt: Message) -> tuple[str, int]:
    return attempt.get("job_id", ""), attempt.get("fence", 0)
