"""From every state the job ends, once the faults are over: what "nothing is lost" means.

Everybody who held an attempt is dead, or worse: stopped processes of earlier attempts have continued and send
heartbeats with their old fences. The broker was emptied. Time passes, housekeeping runs, one healthy worker works,
and a client whose job is paused resumes it. The job must then end within a few rounds.
"""

from dataclasses import dataclass
from typing import Final

from tests.model.canonical import JUMP
from tests.model.database import Database, Operation
from tests.model.operations import Operations
from tests.model.violation import Violation

ROUNDS: Final = 6
"""More than there are attempts; each ends one, or begins one and ends it."""


@dataclass(frozen=True)
class Ways:
    """How the job may reach the healthy worker."""

    bell: bool
    """Through the relay."""
    poll: bool
    """By looking into SQL."""
    redispatch: bool


class Healing:
    """What becomes of each state of the database when the faults are over; each is worked out once."""

    def __init__(self, database: Database, operations: Operations, ways: Ways) -> None:
        self._database = database
        self._operations = operations
        self._ways = ways
        self._heals: set[tuple[int, bool]] = set()

    def demand(self, state: int, *, message: bool = False) -> None:
        """
        Args:
            message: the broker holds a bell that is not lost.

        Raises:
            Violation: the job does not end.
        """
        passed = [(state, message)]
        for _ in range(ROUNDS):
            if passed[-1] in self._heals or self._is_over(passed[-1][0]):
                self._heals.update(passed)
                return
            passed.append(self._round(*passed[-1]))
        job = self._database.rows(passed[-1][0])["jobs"][0]
        raise Violation("every job ends", f"it is {job['state']} for ever once the faults are over, with {self._ways}")

    def _is_over(self, state: int) -> bool:
        return self._database.rows(state)["jobs"][0]["completed_at"] is not None

    def _round(self, state: int, message: bool) -> tuple[int, bool]:
        operations = self._operations
        state = self._database.jump(state, JUMP)
        job = self._database.rows(state)["jobs"][0]
        for fence in range(1, job["fence"]):
            state = self._after(state, operations.heartbeat(fence))
        state = self._after(state, operations.reap())
        state = self._after(state, operations.expire())
        if self._database.rows(state)["jobs"][0]["state"] == "paused":
            state = self._after(state, operations.resume())
        if self._ways.redispatch:
            state = self._after(state, operations.redispatch())
        if self._ways.bell:
            rung, state = self._database.apply(state, operations.relay())
            message = message or rung
        if self._ways.poll or message:
            state = self._work(state)
        return state, False

    def _work(self, state: int) -> int:
        """One attempt that goes well."""
        fence = self._database.rows(state)["jobs"][0]["fence"] + 1
        claimed, state = self._database.apply(state, self._operations.claim(fence))
        return self._after(state, self._operations.finish(fence)) if claimed else state

    def _after(self, state: int, operation: Operation) -> int:
        return self._database.apply(state, operation)[1]
