"""Events arrive once, in order and completely, whatever happens to the connection."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from itertools import repeat
from threading import Timer

import pytest

from noisemill import following
from noisemill.client import Client
from noisemill.errors import ApiError, JobCanceled, JobFailed, ServerUnreachable, WaitTimeout
from tests.client.little import Answer, App, LittleServer, Request
from tests.client.log import JOB, JobServer, as_stream, event, finished_log, job_view


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect without the pauses that spare a real server."""
    monkeypatch.setattr(following, "backoff", lambda tries: 0.001)
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)


def _seqs(client: Client, after: int = 0) -> list[int]:
    return [event.seq for event in client.events(JOB, after)]


def _every_so_often(body: bytes, bytes_apart: int) -> Iterator[int]:
    return iter(range(0, len(body), bytes_apart))


@pytest.mark.parametrize("counted", [True, False], ids=["cut", "ended early"])
def test_a_stream_that_breaks_again_and_again_shows_each_event_once_in_order(
    little: LittleServer, client: Client, counted: bool
):
    log = finished_log(20)
    # The log grows only as far as streams got, so that nothing can be read past them.
    app = JobServer(log=log, cuts=_every_so_often(as_stream(log), 97), counted=counted)
    little.app = _growing(app)

    assert _seqs(client) == list(range(1, len(log) + 1))


def _growing(app: JobServer) -> JobServer:
    """Make the log longer by two events with each stream, until all of it is there."""
    whole, app.log = app.log, app.log[:1]
    app.job = job_view("running")
    answer = app._stream

    def stream(after: int) -> Answer:
        app.log = whole[: len(app.log) + 2]
        if len(app.log) == len(whole):
            app.job = job_view("succeeded")
        return answer(after)

    app._stream = stream  # pyright: ignore[reportAttributeAccessIssue]
    return app


def test_wherever_a_stream_breaks_no_event_is_shown_in_half(little: LittleServer, client: Client):
    for cut in range(0, len(as_stream(finished_log())), 11):
        little.app = JobServer(cuts=iter([cut]), counted=False)

        assert _seqs(client) == list(range(1, 9)), f"cut after {cut} bytes"


def test_events_that_a_stream_left_out_are_read_from_the_log(little: LittleServer, client: Client):
    little.app = JobServer(hidden=frozenset({2, 4, 5}))

    assert _seqs(client) == list(range(1, 9))


def test_events_that_a_stream_repeats_are_shown_once(little: LittleServer, client: Client):
    little.app = JobServer(repeats=True, cuts=iter([500, 700, 900]))

    assert _seqs(client) == list(range(1, 9))


def test_a_reconnected_stream_asks_for_what_follows_the_last_event_seen(little: LittleServer, client: Client):
    log = finished_log()
    app = JobServer(log=log[:3], job=job_view("running"))
    little.app = app
    events = client.events(JOB)
    for _ in range(3):
        next(events)
    app.log = log[:5]
    for _ in range(2):
        next(events)
    app.log, app.job = log, job_view("succeeded")

    list(events)

    asked = [request.headers["last-event-id"] for request in little.requests if "last-event-id" in request.headers]
    assert asked == ["0", "5"]


def test_where_streams_do_not_work_the_log_is_polled(little: LittleServer, client: Client):
    little.app = JobServer(streams=False)

    assert _seqs(client) == list(range(1, 9))


def test_where_streams_always_break_before_the_first_event_the_log_is_polled(little: LittleServer, client: Client):
    app = JobServer(log=finished_log()[:2], job=job_view("running"), cuts=repeat(0))

    def ends_after_many_looks(request: Request) -> Answer:
        if len(little.requests) > 60:
            app.log, app.job = finished_log(), job_view("succeeded")
        return app(request)

    little.app = ends_after_many_looks

    assert _seqs(client) == list(range(1, 9))
    assert sum("last-event-id" in request.headers for request in little.requests) <= 5


def test_events_end_with_the_final_state_though_the_stream_stays_open(little: LittleServer, client: Client):
    little.app = _left_open(JobServer())
    begun = time.monotonic()

    assert _seqs(client)[-1] == 8
    assert time.monotonic() - begun < 5


def test_an_event_that_comes_with_the_end_of_the_job_is_not_missed(little: LittleServer, client: Client):
    """The job ends between two looks; what was committed with its end is in the log that is read after."""
    app = JobServer(log=finished_log()[:5], streams=False)

    def ends_when_looked_at(request: Request) -> Answer:
        if not request.path.endswith("/events"):
            app.log = finished_log()
        return app(request)

    little.app = ends_when_looked_at

    assert _seqs(client) == list(range(1, 9))


def test_a_log_message_may_hold_any_character(little: LittleServer, client: Client):
    message = "one\u2028two\u0085three\x1cfour"
    log = [event(1, "job.log", message=message), event(2, "job.state", state="succeeded")]
    little.app = JobServer(log=log)

    assert next(client.events(JOB)).data["message"] == message


def test_events_can_be_asked_for_from_the_middle(little: LittleServer, client: Client):
    little.app = JobServer()

    assert _seqs(client, after=6) == [7, 8]


def test_more_events_than_a_page_holds_are_all_shown(little: LittleServer, client: Client):
    little.app = JobServer(log=finished_log(500), streams=False)

    assert _seqs(client) == list(range(1, 504))


def test_events_survive_a_server_that_restarts():
    log = finished_log()
    first = LittleServer()
    with Client(first.url, "nm_secret", max_retries=0, patience=20) as client:
        with first.running():
            first.app = JobServer(log=log[:4], job=job_view("running"), counted=False)
            events = client.events(JOB)
            seen = [next(events).seq for _ in range(4)]
        with ExitStack() as stack:
            later = Timer(0.3, lambda: stack.enter_context(_serving(JobServer(log=log), first.port)))
            later.start()
            seen += [event.seq for event in events]
            later.join()

    assert seen == list(range(1, 9))


def _serving(app: App, port: int) -> AbstractContextManager[LittleServer]:
    server = LittleServer(port)
    server.app = app
    return server.running()


def test_a_server_that_stays_away_is_given_up():
    server = LittleServer()
    with Client(server.url, "nm_secret", patience=0.2, max_retries=1) as client:
        with server.running():
            server.app = JobServer(log=finished_log()[:4], job=job_view("running"))
            events = client.events(JOB)
            for _ in range(4):
                next(events)

        with pytest.raises(ServerUnreachable, match="noisemill up"):
            next(events)


def test_an_unknown_job_is_said_at_once(little: LittleServer, client: Client):
    little.app = JobServer()

    with pytest.raises(ApiError, match="no such job"):
        next(client.events("job_other"))
    assert len(little.requests) == 1


def test_wait_returns_the_finished_job_with_its_progress_told_on_the_way(little: LittleServer, client: Client):
    little.app = JobServer()
    told: list[tuple[int, float]] = []

    job = client.wait(JOB, on_progress=lambda progress: told.append((progress.step, progress.figures["loss"])))

    assert job.state == "succeeded"
    assert told == [(step, 1 / step) for step in range(1, 6)]


def test_wait_raises_what_a_failed_job_says(little: LittleServer, client: Client):
    error = {"code": "nan_loss", "message": "the loss is not a number at step 7", "retryable": False}
    little.app = JobServer(log=finished_log(state="failed"), job=job_view("failed", error=error))

    with pytest.raises(JobFailed, match="nan_loss.*at step 7") as raised:
        client.wait(JOB)
    assert raised.value.job.error and raised.value.code == "nan_loss"


def test_wait_tells_a_canceled_job_from_a_failed_one(little: LittleServer, client: Client):
    little.app = JobServer(log=finished_log(state="canceled"), job=job_view("canceled"))

    with pytest.raises(JobCanceled):
        client.wait(JOB)


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "poll"])
def test_wait_gives_up_when_its_time_is_over(little: LittleServer, client: Client, streams: bool):
    little.app = JobServer(log=finished_log()[:4], job=job_view("running"), streams=streams)
    begun = time.monotonic()

    with pytest.raises(WaitTimeout, match="jobs cancel"):
        client.wait(JOB, timeout=0.3)
    assert 0.3 <= time.monotonic() - begun < 1.0


def test_a_wait_that_streams_still_ends_in_time(little: LittleServer, client: Client, monkeypatch: pytest.MonkeyPatch):
    """The stream is left for the log before its silence could last past the deadline."""
    monkeypatch.setattr(following, "SILENCE_SECONDS", 1.0)
    little.app = _left_open(JobServer(log=finished_log()[:4], job=job_view("running")))
    begun = time.monotonic()

    with pytest.raises(WaitTimeout):
        client.wait(JOB, timeout=1.5)
    assert any("last-event-id" in request.headers for request in little.requests)
    assert 1.5 <= time.monotonic() - begun < 1.95


def _left_open(app: JobServer) -> App:
    def stream(request: Request) -> Answer:
        answer = app(request)
        return replace(answer, counted=False, held=True) if answer.media_type == "text/event-stream" else answer

    return stream
