"""Follow a job's events to its end: every event once, in order, over connections that may break.

The log in SQL is the truth and is numbered without a gap, so the number of the last event seen is
all there is to remember: a new connection continues after it, and what a stream left out is read
from the log. Where streams do not work at all (a proxy that collects answers), the log is polled.
"""

import time
from collections.abc import Iterator
from typing import Final

import httpx
from pydantic import ValidationError

from noisemill.errors import ApiError, ServerUnreachable, UnexpectedAnswer
from noisemill.sse import Message, messages
from noisemill.transport import Transport, backoff
from shared.wire import FINAL_STATES, EventView, JobView, Page

# The server sends a comment more often than that, so longer silence means a dead connection.
SILENCE_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.5
_PAGE: Final = 200
_FRUITLESS_STREAMS: Final = 3


class Follower:
    """One pass over the events of one job, after event number ``after``."""

    def __init__(
        self, transport: Transport, job_path: str, *, after: int, patience: float, deadline: float | None
    ) -> None:
        self._transport = transport
        self._path = job_path
        self._seq = after
        self._patience = patience
        self._deadline = deadline
        self._fruitless = 0

    def events(self) -> Iterator[EventView]:
        """Yield until the job is in a final state and its log is read to the end.

        Returns early when the deadline has passed.

        Raises:
            ApiError: the server refuses (no such job, wrong key).
            ServerUnreachable: nobody answered for longer than ``patience``.
        """
        while not self._is_late():
            before = self._seq
            if self._may_stream():
                yield from self._streamed()
            # A stream that ended may have ended early: the log has the last word.
            job = self._job()
            yield from self._logged()
            if job.is_final:
                return
            self._fruitless = 0 if self._seq > before else self._fruitless + 1
            self._pause()

    def _may_stream(self) -> bool:
        # Towards the deadline we poll, because a stream could keep us waiting past it.
        in_time = self._deadline is None or self._deadline - time.monotonic() > SILENCE_SECONDS
        return in_time and self._fruitless < _FRUITLESS_STREAMS

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _pause(self) -> None:
        # Right after a stream that brought something, the next one may follow at once.
        pause = (
            POLL_SECONDS
            if self._fruitless >= _FRUITLESS_STREAMS or not self._may_stream()
            else backoff(self._fruitless)
        )
        left = pause if self._deadline is None else self._deadline - time.monotonic()
        time.sleep(max(0.0, min(pause, left)))

    def _streamed(self) -> Iterator[EventView]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self._seq)}
        params = {"after": self._seq}
        try:
            with self._transport.stream(
                f"{self._path}/events", params=params, headers=headers, silence=SILENCE_SECONDS
            ) as response:
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    self._fruitless = _FRUITLESS_STREAMS
                    return
                yield from self._read(response)
        except httpx.TransportError:
            return  # the caller looks into the log, patiently, and comes back
        except ApiError as error:
            if error.status < 500 and error.status != 429:
                raise

    def _read(self, response: httpx.Response) -> Iterator[EventView]:
        for message in messages(response.iter_bytes()):
            if message.data:
                event = _event(message)
                yield from self._in_order(event)
                if event.data.get("state") in FINAL_STATES:
                    return
            if not self._may_stream():
                return

    def _in_order(self, event: EventView) -> Iterator[EventView]:
        if event.seq > self._seq + 1:
            yield from self._logged()
        if event.seq > self._seq:
            self._seq = event.seq
            yield event

    def _logged(self) -> Iterator[EventView]:
        while True:
            params = {"after": self._seq, "limit": _PAGE}
            page = Page[EventView].model_validate_json(self._get("/events", params=params).content)
            for event in page.data:
                if event.seq > self._seq:
                    self._seq = event.seq
                    yield event
            if not (page.has_more and page.data):
                return

    def _job(self) -> JobView:
        return JobView.model_validate_json(self._get("").content)

    def _get(self, path: str, **options: object) -> httpx.Response:
        give_up = time.monotonic() + self._patience
        for tries in range(1, 1_000_000):
            try:
                return self._transport.request("GET", self._path + path, repeatable=True, **options)
            except (ServerUnreachable, ApiError) as error:
                passing = isinstance(error, ServerUnreachable) or error.status >= 500
                if not passing or not self._transport.has_answered or time.monotonic() > give_up or self._is_late():
                    raise
            time.sleep(backoff(tries))
        raise AssertionError("unreachable")


def _event(message: Message) -> EventView:
    try:
        return EventView.model_validate_json(message.data)
    except ValidationError as error:
        raise UnexpectedAnswer(f"An event of the stream is not one of ours: {message.data[:200]}") from error
