"""Whether a history is legal. Knows nothing of faults: the rules are the same for a quiet run.

Each rule yields its violations as sentences; a run without any has lost nothing and done nothing twice.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

from shared.ids import parse, public
from shared.jobs.rows import Attempt, Event, Job
from shared.jobs.state import MOVES, AttemptOutcome, JobState
from tests.chaos.history import PASSING_KINDS, History
from tests.chaos.load import Ticket, tells_versions

Violations = Iterator[str]


class Checker:
    """The rules, over one history and what the clients know."""

    def __init__(
        self, history: History, tickets: Sequence[Ticket], references: Mapping[str, Mapping[str, str]]
    ) -> None:
        self.history, self.tickets, self.references = history, tickets, references

    def lost(self) -> Violations:
        """Every job that was accepted has ended."""
        for ticket in self.tickets:
            job = self._job(ticket)
            if job is None:
                yield f"{ticket.job_id} was accepted and is not there"
            elif not job.state.is_final:
                yield f"{ticket.job_id} is still {job.state.value}"

    def duplicates(self) -> Violations:
        """No request made two jobs, and no job has two visible results."""
        for job_id, times in Counter(ticket.job_id for ticket in self.tickets).items():
            if times > 1:
                yield f"{job_id} is the answer to {times} different requests"
        known = {parse("job", ticket.job_id) for ticket in self.tickets}
        for job in self.history.jobs:
            if job.id not in known:
                yield f"{_name(job)} ({job.summary}) was made, and no client knows it: a request made two jobs"
            yield from self._doubles_of(job)

    def _doubles_of(self, job: Job) -> Violations:
        outcomes = [attempt.outcome for attempt in self.history.attempts_of.get(job.id, [])]
        if outcomes.count(AttemptOutcome.SUCCEEDED) > 1:
            yield f"{_name(job)}: {outcomes.count(AttemptOutcome.SUCCEEDED)} of its attempts succeeded"
        final = [one for one in self.history.artifacts_of.get(job.id, []) if one.kind not in PASSING_KINDS]
        for name, times in Counter(one.name for one in final).items():
            if times > 1:
                yield f"{_name(job)}: {name} is visible {times} times"
        versions = sum(version.job_id == job.id for version in self.history.versions)
        datasets = sum(dataset.job_id == job.id for dataset in self.history.datasets)
        if versions > 1 or datasets > 1:
            yield f"{_name(job)} made {versions} versions and {datasets} datasets"

    def wrong_bytes(self) -> Violations:
        """What a job made is what the same request made undisturbed; all of it is in storage."""
        for ticket in self.tickets:
            job, expected = self._job(ticket), self.references.get(ticket.request)
            if job is None or job.state != JobState.SUCCEEDED or expected is None:
                continue
            made = self.history.result_of(job, essential=tells_versions(ticket.request))
            if made != expected:
                wrong = sorted(name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name))
                yield f"{ticket.job_id} ({ticket.request}): {', '.join(wrong)} differ from the undisturbed run"

    def objects(self) -> Violations:
        """Every row that is no tombstone has its object, with its size and digest, under a key of its attempt."""
        for one in self.history.artifacts:
            job_id = public("job", one.job_id)
            if one.removed_at is None and self.history.objects.get(one.key) != (one.size_bytes, one.sha256):
                yield f"{job_id}: the object of {one.name} (attempt {one.fence}) is missing or has other bytes"
            if not one.key.startswith(f"jobs/{job_id}/{one.fence}/"):
                yield f"{job_id}: the key {one.key} does not name attempt {one.fence}"
        visible = {(one.job_id, one.key, one.sha256) for one in self.history.artifacts}
        for version in self.history.versions:
            if (version.job_id, version.weights["key"], version.weights["sha256"]) not in visible:
                yield f"version {version.version} of {public('job', version.job_id)} has weights without an artifact"
        for dataset in self.history.datasets:
            for file in dataset.files:
                if (dataset.job_id, file["key"], file["sha256"]) not in visible:
                    yield f"{public('ds', dataset.id)}: {file['name']} has no artifact"

    def endings(self) -> Violations:
        """Every job ended as its request demands, and none succeeded after its cancel was acknowledged."""
        for ticket in self.tickets:
            job = self._job(ticket)
            if job is None:
                continue
            ends, expected = self._demanded(ticket)
            if job.state.value not in ends:
                error = f" ({job.error_code}: {job.error_message})" if job.error_code else ""
                yield f"{ticket.job_id} ({ticket.request}) ended {job.state.value}{error}, not {sorted(ends)}"
            elif expected is not None and job.error_code != expected:
                yield f"{ticket.job_id} ({ticket.request}) failed with {job.error_code}, not {expected}"
            if ticket.told.get("cancel") in ("canceling", "canceled") and job.state != JobState.CANCELED:
                yield f"{ticket.job_id} is {job.state.value} after its cancel was acknowledged"

    def _demanded(self, ticket: Ticket) -> tuple[Collection[str], str | None]:
        """How its job must end: who waited for one that did not succeed, with that."""
        needed = self._needed(ticket)
        if needed is None or needed.state == JobState.SUCCEEDED:
            return ticket.ends, ticket.error
        return {"failed"}, "dependency_failed"

    def waits(self) -> Violations:
        """Who waited began after the other had succeeded, with the version that it made, or else not at all."""
        for ticket in self.tickets:
            job, needed = self._job(ticket), self._needed(ticket)
            if job is None or needed is None:
                continue
            began = [one.started_at for one in self.history.attempts_of.get(job.id, []) if one.started_at is not None]
            if needed.state != JobState.SUCCEEDED:
                if began:
                    yield f"{ticket.job_id} began, and {ticket.needs}, for which it waited, is {needed.state.value}"
                continue
            if began and (needed.completed_at is None or min(began) < needed.completed_at):
                yield f"{ticket.job_id} began before {ticket.needs}, for which it waited, had ended"
            if job.state == JobState.SUCCEEDED:
                yield from self._read_what_was_made(ticket, job, needed)

    def _read_what_was_made(self, ticket: Ticket, job: Job, needed: Job) -> Violations:
        names = {model.id: model.name for model in self.history.models}
        made = {one.job_id: one for one in self.history.versions}.get(needed.id)
        if made is None:
            yield f"{ticket.needs} made no version, and {ticket.job_id} waited for it"
            return
        expected = f"{names.get(made.model_id)}@{made.version}"
        if job.spec.get(ticket.field) != expected:
            yield f"{ticket.job_id}: its {ticket.field} is {job.spec.get(ticket.field)}, and {expected} was made for it"
        read = job.inputs.get("models", {}).get(ticket.field) or job.inputs.get("version_id")
        if read != str(made.id):
            yield f"{ticket.job_id} read version {read}, and {made.id} was made for it"

    def _needed(self, ticket: Ticket) -> Job | None:
        return None if ticket.needs is None else self.history.by_id.get(parse("job", ticket.needs))

    def attempts(self) -> Violations:
        """Fences without a gap, one attempt at a time, and the last one is the job's."""
        for job in self.history.jobs:
            attempts = self.history.attempts_of.get(job.id, [])
            name = _name(job)
            if [attempt.fence for attempt in attempts] != list(range(1, job.fence + 1)):
                yield f"{name}: its attempts are {[attempt.fence for attempt in attempts]}, its fence is {job.fence}"
            for earlier, later in pairwise(attempts):
                if earlier.ended_at is None or later.started_at is None or earlier.ended_at > later.started_at:
                    yield f"{name}: attempt {earlier.fence} had not ended when {later.fence} began"
            if job.state.is_final and any(attempt.ended_at is None for attempt in attempts):
                yield f"{name} has ended and an attempt of it has not"
            yield from self._counted(job, attempts)

    def _counted(self, job: Job, attempts: Sequence[Attempt]) -> Violations:
        name, won = _name(job), [a.fence for a in attempts if a.outcome == AttemptOutcome.SUCCEEDED]
        if (won == [job.fence]) != (job.state == JobState.SUCCEEDED):
            yield f"{name} is {job.state.value}, its fence is {job.fence}, and {won} succeeded"
        lost = sum(attempt.outcome == AttemptOutcome.LOST for attempt in attempts)
        if lost != job.losses:
            yield f"{name}: {lost} attempts were lost, {job.losses} were counted"
        for one in self.history.artifacts_of.get(job.id, []):
            if one.fence > job.fence or (one.kind not in PASSING_KINDS and [one.fence] != won):
                yield f"{name}: {one.name} belongs to attempt {one.fence}, and {won or 'none'} succeeded"

    def events(self) -> Violations:
        """The log has no gap, tells legal moves, and no attempt speaks once the next has begun."""
        for job in self.history.jobs:
            events = self.history.events_of.get(job.id, [])
            if [event.seq for event in events] != list(range(1, job.event_seq + 1)):
                yield f"{_name(job)}: {len(events)} events with gaps or doubles, {job.event_seq} were counted"
            yield from self._moves(job, [event for event in events if event.type == "job.state"])
            yield from self._voices(job, events)

    def _moves(self, job: Job, events: Sequence[Event]) -> Violations:
        name, states = _name(job), [JobState(event.data["state"]) for event in events]
        if not states or states[0] != JobState.QUEUED or states[-1] != job.state:
            yield f"{name} is {job.state.value}, and its log says {[state.value for state in states]}"
        for before, after in pairwise(states):
            if after not in MOVES[before]:
                yield f"{name} moved from {before.value} to {after.value}"
        versions = [event.data["state_version"] for event in events]
        if any(earlier >= later for earlier, later in pairwise([*versions, job.state_version + 1])):
            yield f"{name}: its state_version did not grow: {versions}, then {job.state_version}"
        if any(state == JobState.CANCELING for state in states) and job.state == JobState.SUCCEEDED:
            yield f"{name} succeeded after it was canceling"

    def _voices(self, job: Job, events: Sequence[Event]) -> Violations:
        current = 0
        for event in events:
            attempt = event.data.get("attempt", current)
            if event.type == "job.state" and event.data["state"] == "running":
                current = max(current, attempt)
            if attempt != current:
                yield f"{_name(job)}: event {event.seq} ({event.type}) is of attempt {attempt}, in attempt {current}"

    def usage(self) -> Violations:
        """Every attempt that ended was charged once, and nothing else was."""
        charged = Counter((row.job_id, row.fence) for row in self.history.usage)
        ended = {(attempt.job_id, attempt.fence) for attempt in self.history.attempts if attempt.ended_at is not None}
        for job_id, fence in ended ^ charged.keys():
            word = "was not charged" if (job_id, fence) in ended else "was charged and has not ended"
            yield f"{public('job', job_id)}: attempt {fence} {word}"

    def orphans(self) -> int:
        """Objects of attempts that no row names; legal until housekeeping has come by."""
        named = {one.key for one in self.history.artifacts}
        return len(self._objects_but(named))

    def left_over(self) -> Violations:
        """After housekeeping: every object of an attempt has its row, and none of a removed artifact is there."""
        named = {one.key for one in self.history.artifacts if one.removed_at is None}
        for key in self._objects_but(named):
            yield f"{key} is still there, and no row names it"

    def _objects_but(self, named: Collection[str]) -> list[str]:
        return [key for key in self.history.objects if key.startswith("jobs/") and key not in named]

    def interventions(self) -> int:
        """Jobs that were canceled or retried though no client of the run asked for it: by hand, then."""
        canceled = {parse("job", ticket.job_id) for ticket in self.tickets if "cancel" in ticket.told}
        known = {parse("job", ticket.job_id) for ticket in self.tickets}
        return sum(
            (job.cancel_requested_at is not None and job.id not in canceled)
            or (job.retry_of is not None and job.id not in known)
            for job in self.history.jobs
        )

    def _job(self, ticket: Ticket) -> Job | None:
        return self.history.by_id.get(parse("job", ticket.job_id))


def _name(job: Job) -> str:
    return public("job", job.id)
