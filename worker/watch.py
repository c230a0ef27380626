"""One attempt, from claim to end: relays what the runner reports, heartbeats, stops it, ends it.

SQL may be away for a while: reports are kept and written in order once it is back. Without a confirmed heartbeat the
runner is asked in time to leave a checkpoint, and at three quarters of the lease it is killed, whether or not anybody
still turns the loop (``worker/company.py``). Where others share the runner, an attempt that must end is asked first.
"""

import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy.orm import Session

from shared import errors
from shared.database import AWAY
from shared.errors import InternalError, JobError, LeaseLost, Stalled, TimeLimitExceeded, WorkerLost
from shared.ids import public
from shared.jobs import attempts, products
from shared.jobs.state import JobState
from worker.channel import Message
from worker.device import GONE
from worker.fuse import Fuse
from worker.reports import Reports
from worker.run import StopReason, most_urgent

if TYPE_CHECKING:
    from worker.supervisor import Supervisor

logger = logging.getLogger(__name__)

_ASK, _SELF_FENCE = 0.5, 0.75
"""Shares of the lease after which an attempt without a confirmed heartbeat is asked to stop, and kills its own work."""
_EVENT_STEP, _EVENT_SECONDS = 0.01, 10.0
"""A progress event is written when this share of the work, or this time, has passed since the last."""
_AGAIN: Final = 0.2
"""Seconds between two tries to commit an end."""
_VISIBLE_AT_ONCE: Final = frozenset({"preview", "checkpoint"})
_ENDINGS: Final = frozenset({"done", "failed", "stopped", "parted"})
_SIGNS_OF_LIFE: Final = frozenset({"phase", "step", "moved"})
"""Said by the thread that works, as it gets on, or while bytes move, which ends when all have. All else may come from
one that waits for storage while the work hangs."""
_ERRORS: Final = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, JobError)
}


class Companions(Protocol):
    """The attempts that have the runner at the same time, as one of them sees it."""

    @property
    def are_several(self) -> bool:
        """Whether killing the runner would end others, too."""
        ...


class Watch:
    """Sees one attempt through: ``begin``, then ``hear`` and ``beat`` until it is ``over``, then ``close``."""

    def __init__(
        self, supervisor: "Supervisor", claim: attempts.Claim, *, asked_at: float, company: Companions
    ) -> None:
        self._supervisor, self._company = supervisor, company
        self._claim = claim
        self.attempt = {"job_id": public("job", claim.job_id), "fence": claim.fence}
        self.over = False
        """Nothing is left to do: it has ended in SQL, or its lease runs out by itself."""
        self.next_beat = 0.0
        self.seconds = 0.0
        """Its part of the device's time so far."""
        self.is_done = False
        """The runner has nothing to do with it any more; what is left is to say so in SQL."""
        self.is_unforeseen = False
        """It ended by an error that nobody foresaw, so that nobody knows what that left behind on the device."""
        self._is_lost = False
        self._ending: Message | None = None
        self._give_up = float("inf")
        self._lease = supervisor.settings.jobs.lease
        self._settings = supervisor.settings.worker
        self._reports = Reports(claim, lease=self._lease, ask=supervisor.ask)
        self._artifacts: list[attempts.NewArtifact] = []
        self._step, self._steps, self._figures = 0, 0, dict[str, Any]()
        self._phase, self._phases = "starting", dict[str, float]()
        self._began = self._phase_began = self._lived_at = time.monotonic()
        self._event_at, self._event_value, self._event_phase = 0.0, -1.0, ""
        self._stop_reason: StopReason | None = None
        self._stop_by = float("inf")
        self._failed_by: JobError | None = None
        self._alarm = Fuse(self._lease.total_seconds() * _ASK, self._interrupt)
        self._fuse = Fuse(self._lease.total_seconds() * _SELF_FENCE, supervisor.device.kill)
        # The lease began when SQL ran the claim, which may be long before the answer to it came.
        self._feed(asked_at)

    def begin(self) -> None:
        """Have the runner do it."""
        claim = self._claim
        assignment = {"type": claim.type.value, "spec": claim.spec, "inputs": claim.inputs}
        self._supervisor.device.send({"type": "run", "assignment": self.attempt | assignment})
        # The runner is at work while threads are started here.
        self._alarm.light()
        self._fuse.light()
        logger.info("job %s attempt %d: %s", public("job", claim.job_id), claim.fence, claim.type.value)
        self.next_beat = time.monotonic() + self._settings.beat.total_seconds()

    def close(self) -> None:
        """Burn nothing any more."""
        # Who waits for the job need not wait for our threads.
        self._supervisor.ring(self._claim.job_id)
        self._alarm.put_out()
        self._fuse.put_out()

    def hear(self, message: Message) -> None:
        """Take what the runner says of this attempt."""
        if not self.is_done:
            self._survive(lambda: self._end_by(message) if message["type"] in _ENDINGS else self._take(message))

    def beat(self) -> None:
        """Confirm the lease, write what is new, and enforce what is due; or try again to commit how it ended."""
        self._survive(self._end_again if self.is_done else self._beat)
        self.next_beat = time.monotonic() + (_AGAIN if self.is_done else self._settings.beat.total_seconds())

    def runner_gone(self, *, was_shared: bool) -> None:
        """The runner is dead; ``was_shared``: others die with it, and nobody knows because of which."""
        if not self.is_done:
            self._survive(lambda: self._end_by(GONE | {"was_shared": was_shared}))

    def _survive(self, act: Callable[[], None]) -> None:
        try:
            act()
        except LeaseLost as lost:
            self._forsake(lost)
        except Exception:
            # Not an outage: SQL or we refuse what this attempt reports, and would again.
            logger.exception("the attempt's reports cannot be recorded")
            self._reports.drop()
            self._abort(InternalError("what the job reported could not be recorded; the worker's log says why"))

    def _forsake(self, lost: LeaseLost) -> None:
        """The attempt is not ours any more: it must leave the device."""
        if self.is_done:
            self.over = True
        elif self._company.are_several and not self._is_lost and not self.over:
            logger.warning("%s; stopping it", lost)
            self._is_lost = True
            self._stop("cancel", self._grace)
            # Its lease is not ours to hold, and the device belongs to others, too.
            self._alarm.put_out()
            self._fuse.put_out()
        elif not self.over:
            logger.warning("%s; killing the runner", lost)
            self._supervisor.device.kill()
            self.over = True

    def _abort(self, why: JobError) -> None:
        """Fail the attempt whatever the runner does: softly where it serves others, too."""
        self._failed_by = why
        if self._company.are_several and not self.is_done:
            self._stop("cancel", self._grace)
            return
        if not self.is_done:
            self._supervisor.device.kill()
        try:
            self._end_by(GONE)
        except LeaseLost as lost:
            logger.warning("%s", lost)
            self.over = True
        except Exception:
            logger.exception("the attempt's end cannot be recorded; its lease runs out")
            self.over = True

    def _end_by(self, ending: Message) -> None:
        self.is_done = True
        self.is_unforeseen |= ending["type"] == "parted" or ending.get("code") == InternalError.code
        if self._is_lost:
            self.over = True
            return
        self._enter("ended")
        self._ending, self._give_up = ending, time.monotonic() + self._lease.total_seconds()
        self._commit_ending()

    @property
    def _grace(self) -> float:
        """Seconds from asking the runner to stop to killing it; it may be busy with a step or a model of others."""
        graces = self._settings.cancel_grace, self._settings.drain_grace
        return graces[self._company.are_several].total_seconds()

    def _take(self, message: Message) -> None:
        if message["type"] in _SIGNS_OF_LIFE:
            self._lived_at = time.monotonic()
        match message:
            case {"type": "phase", "phase": phase}:
                self._enter(phase)
            case {"type": "step", "step": step, "steps": steps, "figures": figures}:
                self._step, self._steps, self._figures = step, steps, figures
            case {"type": "moved"}:
                pass
            case {"type": "metrics", "step": step, "split": split, "values": values}:
                self._reports.add("job.metric", step=step, split=split, values=values)
            case {"type": "log", "message": text}:
                self._reports.add("job.log", message=text)
            case {"type": "artifact", "artifact": artifact}:
                self._take_artifact(attempts.NewArtifact(**artifact))
            case _:
                logger.warning("ignored message %s", message["type"])

    def _take_artifact(self, artifact: attempts.NewArtifact) -> None:
        if artifact.kind in _VISIBLE_AT_ONCE:
            self._reports.add_artifact(artifact)
        else:
            self._artifacts.append(artifact)

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        self._phases[self._phase] = self._phases.get(self._phase, 0.0) + now - self._phase_began
        self._phase, self._phase_began = phase, now

    def _beat(self) -> None:
        """Write what is new, confirm the lease, learn what the client wants; SQL may be away."""
        if self._is_lost:
            self._enforce()
            return
        self._note_progress()
        sent, has_news = time.monotonic(), self._reports.any_left
        try:
            standing = self._reports.beat()
        except AWAY as error:
            logger.warning("heartbeat failed, trying on: %s", str(error).splitlines()[0])
        else:
            self._feed(sent)
            self._heed(standing)
            if has_news:
                self._supervisor.ring(self._claim.job_id)
        self._enforce()

    def _note_progress(self) -> None:
        value = self._step / self._steps if self._steps else 0.0
        now = time.monotonic()
        fresh = value - self._event_value >= _EVENT_STEP or self._phase != self._event_phase
        if fresh or (value != self._event_value and now - self._event_at >= _EVENT_SECONDS):
            where = {"step": self._step, "steps": self._steps, "phase": self._phase, "figures": self._figures}
            self._reports.add_progress(attempts.Progress(**where))
            self._event_at, self._event_value, self._event_phase = now, value, self._phase

    def _heed(self, standing: attempts.Standing) -> None:
        if standing.state == JobState.CANCELING:
            self._stop("cancel", self._grace)
        elif standing.state == JobState.PAUSING:
            self._stop("pause", self._settings.drain_grace.total_seconds())
        elif standing.preempt:
            # It waits for a checkpoint that is due, however long that takes: nothing is killed for it.
            self._stop("preempt", float("inf"))

    def _enforce(self) -> None:
        """Stop what runs too long, kill what does not stop."""
        now = time.monotonic()
        if self._supervisor.draining.is_set():
            self._interrupt()
        limit = self._claim.timeout
        if limit is not None and now - self._began > limit.total_seconds():
            self._abort_once(TimeLimitExceeded(f"the attempt ran longer than {limit.total_seconds():.0f} s"))
        elif now - self._lived_at > (bound := self._settings.stall.total_seconds()):
            # Whoever shares the device hangs with it, and nobody knows because of whom.
            if not self._company.are_several:
                self._failed_by = Stalled(f"no step and no byte moved within {bound:.0f} s")
            self._supervisor.device.kill()
        if self._stop_reason is not None:
            self._supervisor.device.send({"type": "stop", "reason": self._stop_reason, **self.attempt})
        if now > self._stop_by:
            logger.warning("the runner did not stop in time; killing it")
            self._supervisor.device.kill()

    def _interrupt(self) -> None:
        self._stop("interrupt", self._settings.drain_grace.total_seconds())

    def _feed(self, sent: float) -> None:
        """The lease was confirmed by what was sent then."""
        self._alarm.feed(sent)
        self._fuse.feed(sent)

    def _stop(self, reason: StopReason, grace: float) -> None:
        # Said again at each beat: a runner that was between two jobs did not hear it.
        urgent = most_urgent(self._stop_reason, reason)
        if urgent != self._stop_reason:
            self._stop_reason, self._stop_by = urgent, time.monotonic() + grace
        self._supervisor.device.send({"type": "stop", "reason": urgent, **self.attempt})

    def _abort_once(self, why: JobError) -> None:
        if self._failed_by is None:
            self._abort(why)

    def _end_again(self) -> None:
        # What keeps it from ending may be another row than the job's; the lease must not run out over that.
        with suppress(*AWAY):
            self._reports.beat()
        self._commit_ending()

    def _commit_ending(self) -> None:
        """Commit how the attempt ended, or leave that to the next beat: others may have their leases to hold."""
        claim, ending = self._claim, self._ending or GONE
        is_one_statement = products.shows_as_it_is(claim.type, claim.inputs)
        commit = self._supervisor.settle if is_one_statement else self._supervisor.transact
        try:
            while self._reports.any_left:
                self._reports.beat()
            commit(lambda s: self._end(s, ending))
        except AWAY as error:
            logger.warning("the end of the attempt could not be committed, looking: %s", str(error).splitlines()[0])
            # An error does not say whether the commit happened: the attempt's row does.
            gives_up = self._supervisor.draining.is_set() and time.monotonic() > self._give_up
            self.over = self._has_ended() or gives_up
            # Whoever waits for it should not wait for a beat besides.
            self.next_beat = time.monotonic() + _AGAIN
            # However long it takes from here, the device is not this attempt's to free any more.
            self._alarm.put_out()
            self._fuse.put_out()
        else:
            self.over = True
            if ending["type"] != "done":
                # The job may be in line again, and somebody else idle.
                self._supervisor.has_queued.set()

    def _has_ended(self) -> bool:
        claim = self._claim
        try:
            return self._supervisor.transact(lambda s: attempts.outcome_of(s, claim.job_id, claim.fence)) is not None
        except AWAY:
            return False

    def _end(self, session: Session, ending: Message) -> None:
        claim = self._claim
        whose = {"session": session, "job_id": claim.job_id, "fence": claim.fence, "seconds": self.seconds}
        failed = partial(self._fail, whose)
        match ending:
            case {"type": "done", "result": result} if self._failed_by is None:
                how = {"result": result, "artifacts": self._artifacts, "timings": self._timings(), "steps": self._steps}
                if attempts.succeed(session, claim, **how, seconds=self.seconds) is None:
                    attempts.hand_back(**whose)
            case {"type": "failed", "code": code, "message": message} if self._failed_by is None:
                failed(error=_ERRORS.get(code, InternalError)(message))
            case {"type": "stopped", "reason": reason} if self._failed_by is None:
                attempts.hand_back(**whose, preempted=reason == "preempt")
            case {"type": "parted"} if self._failed_by is None:
                attempts.hand_back(**whose, parted=True)
            case {"type": "gone"} if self._failed_by is None:
                self._end_without_runner(whose, failed, was_shared=ending.get("was_shared", False))
            case _:
                failed(error=self._failed_by or InternalError(f"the runner said {ending['type']}"))

    def _fail(self, whose: dict[str, Any], *, error: JobError) -> None:
        jobs = self._supervisor.settings.jobs
        how = {**whose, "error": error, "backoff": jobs.retry_backoff}
        if error.is_outage:
            attempts.postpone(**how, patience=jobs.storage_patience)
        else:
            attempts.fail(**how)

    def _end_without_runner(self, whose: dict[str, Any], failed: Callable[..., object], *, was_shared: bool) -> None:
        """The runner is dead, and not because this attempt was to fail."""
        status = self._supervisor.device.kill()
        if self._fuse.burnt or self._stop_reason not in (None, "preempt"):
            attempts.hand_back(**whose)
        elif was_shared:
            attempts.hand_back(**whose, parted=True)
        else:
            failed(error=WorkerLost(_obituary(status)))

    def _timings(self) -> dict[str, float]:
        """Milliseconds by what they were spent on."""
        spent = {name: round(seconds * 1000) for name, seconds in self._phases.items()}
        load = spent.pop("starting", 0) + spent.pop("loading_data", 0) + spent.pop("loading_model", 0)
        upload = spent.pop("uploading", 0)
        return {"load_ms": load, "upload_ms": upload, "execution_ms": sum(spent.values())}


def _obituary(status: int | None) -> str:
    """How the runner died, by the exit status that ``subprocess`` gives: minus the signal, if it was one."""
    if status is None or status >= 0:
        return f"the process that ran the job ended (exit status {status})"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = ", as the kernel does when memory runs out" if -status == signal.SIGKILL else ""
    return f"the process that ran the job was killed by {name}{hint}"
