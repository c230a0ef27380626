"""The life of a job: which states exist, and which moves between them are legal.

queued ──► running ──► succeeded | failed
  │ ▲         ├──► canceling ──► canceled
  │ │         ├──► pausing ──► paused ──► queued
  │ │         │◄──── (the pause was withdrawn before it happened)
  │ └─────────┘    (lease lost, interrupted, preempted, or failed with attempts left)
  ├──► canceled | paused
  ├──► failed      (a job that it waits for ended badly; from paused, too)
  └──► expired     (start deadline passed)
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class JobState(StrEnum):
    """Where a job is. The set is closed; detail goes into ``phase``."""

    QUEUED = "queued"
    """Waits to be claimed, once what it needs of other jobs is there."""
    RUNNING = "running"
    """Owned by exactly one attempt, until its lease expires."""
    CANCELING = "canceling"
    """Cancel was asked for; the device is not free yet."""
    PAUSING = "pausing"
    """Pause was asked for; the attempt writes its checkpoint."""
    PAUSED = "paused"
    """Holds a checkpoint and no device; ``resume`` queues it."""
    SUCCEEDED = "succeeded"
    """Done; the result is visible."""
    FAILED = "failed"
    """Ended by an error that no further attempt may cure."""
    CANCELED = "canceled"
    """Ended by request; the device is free."""
    EXPIRED = "expired"
    """Did not start before its deadline."""

    @property
    def is_final(self) -> bool:
        return not MOVES[self]

    @property
    def is_held(self) -> bool:
        """Whether an attempt holds a lease on it."""
        return self in HELD


_S = JobState
MOVES: Final[Mapping[JobState, frozenset[JobState]]] = {
    _S.QUEUED: frozenset({_S.RUNNING, _S.CANCELED, _S.PAUSED, _S.EXPIRED, _S.FAILED}),
    _S.RUNNING: frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELING, _S.PAUSING, _S.QUEUED}),
    _S.CANCELING: frozenset({_S.CANCELED}),
    _S.PAUSING: frozenset({_S.PAUSED, _S.RUNNING, _S.CANCELING, _S.SUCCEEDED, _S.FAILED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELED, _S.FAILED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELED: frozenset(),
    _S.EXPIRED: frozenset(),
}

ENDED_BADLY: Final = frozenset({_S.FAILED, _S.CANCELED, _S.EXPIRED})
"""Ended without what was asked for."""

HELD: Final = frozenset({_S.RUNNING, _S.CANCELING, _S.PAUSING})


def states_before(to: JobState) -> frozenset[JobState]:
    """The states from which a job may move to ``to``."""
    return frozenset(state for state, targets in MOVES.items() if to in targets)


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    """Handed back by its worker, which was told to stop or found storage away; counts against nothing."""
    PREEMPTED = "preempted"
    """Gave its device to others, a training to a more urgent job, at a checkpoint; counts against nothing."""
    LOST = "lost"
    """Its lease ran out."""


class Priority(StrEnum):
    """Which queued job is claimed first."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def rank(self) -> int:
        return {Priority.LOW: 0, Priority.NORMAL: 1, Priority.HIGH: 2}[self]


class JobType(StrEnum):
    """What kind of work a job is. Each goes to the queue of the same class of worker."""

    TRAIN = "train"
    GENERATE = "generate"
    EVALUATE = "evaluate"
    INGEST = "ingest"
    REAVERAGE = "reaverage"
    EXPORT = "export"
    IMPORT = "import"


QUEUES: Final[Mapping[JobType, str]] = {
    JobType.TRAIN: "train",
    JobType.GENERATE: "generate",
    JobType.INGEST: "ingest",
    JobType.EVALUATE: "generate",
    JobType.REAVERAGE: "generate",
    JobType.EXPORT: "generate",
    JobType.IMPORT: "generate",
}
"""Queue of each type of job. A worker serves one or more queues (``-Q``)."""
