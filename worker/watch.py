"""One attempt, from claim to end: relays what the runner reports, heartbeats, stops it, ends it.

The loop waits for the runner's next message at most until the next beat. SQL may be away for a
while: reports are kept and written in order once it is back. Without a confirmed heartbeat the runner
is asked in time to leave a checkpoint, and at three quarters of the lease it is killed, whether or not
this loop still turns.
"""

import logging
import signal
import time
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import Session

from shared import errors
from shared.database import AWAY
from shared.errors import InternalError, JobError, LeaseLost, Stalled, TimeLimitExceeded, WorkerLost
from shared.ids import public
from shared.jobs import attempts
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
_VISIBLE_AT_ONCE: Final = frozenset({"preview", "checkpoint"})
_ENDINGS: Final = frozenset({"done", "failed", "stopped"})
_SIGNS_OF_LIFE: Final = frozenset({"phase", "step"})
"""Said by the thread that works, as it gets on; all else may come from one that uploads while the work hangs."""
_ERRORS: Final = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, JobError)
}


class Watch:
    """Sees one attempt through."""

    def __init__(self, supervisor: "Supervisor", claim: attempts.Claim, *, asked_at: float) -> None:
        self._supervisor = supervisor
        self._claim = claim
        self._attempt = {"job_id": public("job", claim.job_id), "fence": claim.fence}
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
        self._killed_for: JobError | None = None
        self._alarm = Fuse(self._lease.total_seconds() * _ASK, self._interrupt)
        self._fuse = Fuse(self._lease.total_seconds() * _SELF_FENCE, supervisor.device.kill)
        # The lease began when SQL ran the claim, which may be long before the answer to it came.
        self._feed(asked_at)

    def see_through(self) -> None:
        """Run the attempt; afterwards it has ended in SQL, or its lease runs out by itself."""
        claim = self._claim
        logger.info("job %s attempt %d: %s", public("job", claim.job_id), claim.fence, claim.type.value)
        with self._alarm, self._fuse:
            try:
                ending = self._until_ending()
                self._commit_ending(ending)
                if ending.get("code") == InternalError.code:
                    # Nobody foresaw this, so nobody knows what it left behind: a broken CUDA context stays broken.
                    self._supervisor.device.kill()
            except LeaseLost as lost:
                logger.warning("%s; killing the runner", lost)
                self._supervisor.device.kill()
            except Exception:
                # Not an outage: SQL or we refuse what this attempt reports, and would again.
                logger.exception("the attempt's reports cannot be recorded")
                self._reports.drop()
                self._kill(InternalError("what the job reported could not be recorded; the worker's log says why"))
                self._commit_ending(GONE)
        self._supervisor.ring(claim.job_id)
        if not self._supervisor.draining.is_set():
            self._supervisor.device.start()

    def _until_ending(self) -> Message:
        claim, device = self._claim, self._supervisor.device
        assignment = {"type": claim.type.value, "spec": claim.spec, "inputs": claim.inputs}
        device.send({"type": "run", "assignment": self._attempt | assignment})
        beat_every = self._settings.beat.total_seconds()
        next_beat = time.monotonic() + beat_every
        while True:
            message = device.receive(next_beat - time.monotonic())
            if message is GONE:
                return GONE
            if message is not None and self._is_ours(message):
                if message["type"] in _ENDINGS:
                    return message
                self._take(message)
            if time.monotonic() >= next_beat:
                self._beat()
                next_beat = time.monotonic() + beat_every

    def _is_ours(self, message: Message) -> bool:
        """Whether it was said by this attempt: a thread of the last one may still have spoken."""
        return all(message.get(name) == value for name, value in self._attempt.items())

    def _take(self, message: Message) -> None:
        if message["type"] in _SIGNS_OF_LIFE:
            self._lived_at = time.monotonic()
        match message:
            case {"type": "phase", "phase": phase}:
                self._enter(phase)
            case {"type": "step", "step": step, "steps": steps, "figures": figures}:
                self._step, self._steps, self._figures = step, steps, figures
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
            self._stop("cancel", self._settings.cancel_grace.total_seconds())
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
            self._kill(TimeLimitExceeded(f"the attempt ran longer than {limit.total_seconds():.0f} s"))
        elif now - self._lived_at > self._settings.stall.total_seconds():
            self._kill(Stalled(f"no step within {self._settings.stall.total_seconds():.0f} s"))
        elif now > self._stop_by:
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
        self._supervisor.device.send({"type": "stop", "reason": urgent, **self._attempt})

    def _kill(self, why: JobError) -> None:
        self._killed_for = why
        self._supervisor.device.kill()

    def _commit_ending(self, ending: Message) -> None:
        """Commit how the attempt ended, trying until that is known: without SQL there is nothing else to do."""
        self._enter("ended")
        give_up = time.monotonic() + self._lease.total_seconds()
        while True:
            try:
                while self._reports.any_left:
                    self._reports.beat()
                self._supervisor.transact(lambda s: self._end(s, ending))
            except AWAY as error:
                logger.warning("the end of the attempt could not be committed, looking: %s", str(error).splitlines()[0])
            else:
                return
            # An error does not say whether the commit happened: the attempt's row does.
            if self._has_ended() or (self._supervisor.draining.is_set() and time.monotonic() > give_up):
                return
            time.sleep(0.2)

    def _has_ended(self) -> bool:
        claim = self._claim
        try:
            return self._supervisor.transact(lambda s: attempts.outcome_of(s, claim.job_id, claim.fence)) is not None
        except AWAY:
            return False

    def _end(self, session: Session, ending: Message) -> None:
        claim = self._claim
        backoff = self._supervisor.settings.jobs.retry_backoff
        match ending:
            case {"type": "done", "result": result}:
                how = {"result": result, "artifacts": self._artifacts, "timings": self._timings(), "steps": self._steps}
                if attempts.succeed(session, claim, **how) is None:
                    attempts.hand_back(session, claim.job_id, claim.fence)
            case {"type": "failed", "code": code, "message": message}:
                attempts.fail(
                    session, claim.job_id, claim.fence, _ERRORS.get(code, InternalError)(message), backoff=backoff
                )
            case {"type": "stopped", "reason": reason}:
                attempts.hand_back(session, claim.job_id, claim.fence, preempted=reason == "preempt")
            case _:
                self._end_without_runner(session)

    def _end_without_runner(self, session: Session) -> None:
        """The runner is dead: killed by us for a reason, or by somebody else."""
        claim, backoff = self._claim, self._supervisor.settings.jobs.retry_backoff
        status = self._supervisor.device.kill()
        if self._killed_for is not None:
            attempts.fail(session, claim.job_id, claim.fence, self._killed_for, backoff=backoff)
        elif self._fuse.burnt or self._stop_reason not in (None, "preempt"):
            attempts.hand_back(session, claim.job_id, claim.fence)
        else:
            attempts.fail(session, claim.job_id, claim.fence, WorkerLost(_obituary(status)), backoff=backoff)

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
