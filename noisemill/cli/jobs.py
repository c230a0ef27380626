"""``noisemill jobs`` and ``noisemill workers``: what runs, what waits, what went wrong."""

from itertools import islice
from typing import Annotated, Any, cast

import typer

from noisemill.cli.options import AsJson, Limit
from noisemill.cli.watching import watch
from noisemill.client import Client
from noisemill.errors import JobCanceled
from noisemill.terminal import duration, say, show, show_fields, show_json, show_table
from shared.wire import AttemptView, JobView, QueueView

app = typer.Typer(help="List, show and watch jobs; cancel, pause, resume, retry and delete them.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option("--state", help="Only jobs in this state.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only train, generate or ingest jobs.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with Client() as client:
        found = list(islice(client.jobs(state=cast(Any, state), type=cast(Any, kind)), limit))
    if as_json:
        show_json(found)
    elif not found:
        say("No jobs. Submit one with `noisemill train` or `noisemill generate`.")
    else:
        show_table(
            ("job", "type", "state", "progress", "what", "created"),
            [(job.id, job.type, job.state, f"{job.progress.value:.0%}", job.summary, job.created_at) for job in found],
        )


@app.command("show")
def show_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job and its attempts."""
    with Client() as client:
        job = client.job(job_id)
    if as_json:
        show_json(job)
        return
    show_fields(_fields(job))
    if job.attempts:
        print()
        show_table(
            ("attempt", "worker", "started", "took", "outcome", "error"),
            [_attempt(item) for item in job.attempts],
        )


@app.command("watch")
def watch_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Follow a job to its end; with --json, print its events, one a line. Ctrl-C leaves the job running."""
    with Client() as client:
        job = watch(client, client.job(job_id), quiet=as_json, print_events=as_json)
    if not as_json:
        show_fields(_fields(job))


@app.command("cancel")
def cancel_job(
    job_id: JobId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when the job has really stopped.")] = True,
    as_json: AsJson = False,
) -> None:
    """Stop a job."""
    with Client() as client:
        job = client.cancel(job_id)
        if wait and not job.is_final:
            try:
                job = client.wait(job_id)
            except JobCanceled as stopped:
                job = stopped.job
    if as_json:
        show_json(job)
    elif job.state in ("canceled", "canceling"):
        say(f"{job.id} is {job.state}.")
    else:
        say(f"{job.id} had already {job.state}.")


@app.command("pause")
def pause_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a job free its worker; what was done is kept."""
    with Client() as client:
        _present(client.pause(job_id), as_json=as_json)


@app.command("resume")
def resume_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a paused job go on where it was."""
    with Client() as client:
        _present(client.resume(job_id), as_json=as_json)


@app.command("retry")
def retry_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Make a new job of one that failed, expired or was canceled; prints the new job's id."""
    with Client() as client:
        job = client.retry(job_id)
    if as_json:
        show_json(job)
    else:
        say(f"{job.id} is {job.state}. It tries {job.retry_of} again.")
        show(job.id)


@app.command("delete")
def delete_job(job_id: JobId) -> None:
    """Erase an ended job with its events and artifacts; models and datasets stay whole."""
    with Client() as client:
        client.erase(job_id)
    say(f"{job_id} is erased.")


def _present(job: JobView, *, as_json: bool) -> None:
    if as_json:
        show_json(job)
    else:
        say(f"{job.id} is {job.state}.")


def workers(as_json: AsJson = False) -> None:
    """List the workers that the server heard of lately."""
    with Client() as client:
        found = client.workers()
    if as_json:
        show_json(found)
    elif not found:
        say("No worker is there: jobs wait until one is started.")
    else:
        rows = [(w.name, ",".join(w.queues), w.device, w.state, w.job_id, w.seen_at) for w in found]
        show_table(("worker", "queues", "device", "state", "job", "seen"), rows)


def _fields(job: JobView) -> dict[str, object]:
    return {
        "job": job.id,
        "what": job.summary,
        "state": job.state,
        "phase": job.phase,
        "progress": f"{job.progress.step}/{job.progress.steps} ({job.progress.value:.0%})"
        if job.progress.steps
        else None,
        "queue": job.queue and _queue(job.queue),
        "error": job.error and f"{job.error.code}: {job.error.message}",
        "causes": job.error and ", ".join(f"{cause.attempt}: {cause.code}" for cause in job.error.causes),
        "retry of": job.retry_of,
        "retried by": job.retried_by,
        "needs": ", ".join(f"{field}: {needed}" for field, needed in job.needs.items()) or None,
        "reproduces": job.reproduces and job.reproduces.job_id,
        "result": job.result,
        "labels": job.labels,
        "created": job.created_at,
        "took": job.started_at and job.completed_at and duration((job.completed_at - job.started_at).total_seconds()),
        "spec": job.spec,
    }


def _queue(queue: QueueView) -> str:
    if queue.position is None:
        return " ".join([queue.reason.replace("_", " "), *queue.waits_for])
    told = f"number {queue.position}, {queue.reason.replace('_', ' ')}"
    if queue.eta is None:
        return told
    return f"{told}; starts in about {duration(queue.eta.p50)}, likely within {duration(queue.eta.p90)}"


def _attempt(attempt: AttemptView) -> tuple[object, ...]:
    took = attempt.ended_at and duration((attempt.ended_at - attempt.started_at).total_seconds())
    error = attempt.error and f"{attempt.error.code}: {attempt.error.message}"
    return attempt.number, attempt.worker, attempt.started_at, took, attempt.outcome, error
