"""A job's event log behind a little server, in the shape of the API, with streams that break as a test says."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.client.little import Answer, Request

JOB = "job_" + "0" * 32
NOW = "2025-01-01T00:00:00Z"


def job_view(state: str = "running", **changed: Any) -> dict[str, Any]:
    """A job as the API shows it."""
    view = {
        "id": JOB, "type": "train", "state": state, "state_version": 3, "summary": "train digits", "spec": {},
        "priority": "normal", "attempt": 1, "max_attempts": 3, "created_at": NOW,
        "progress": {"value": 0.5, "step": 5, "steps": 10},
    }  # fmt: skip
    return view | changed


def event(seq: int, kind: str = "job.progress", **data: Any) -> dict[str, Any]:
    """An event as the API shows it."""
    return {"seq": seq, "type": kind, "data": data, "created_at": NOW}


def finished_log(num_steps: int = 5, state: str = "succeeded") -> list[dict[str, Any]]:
    """What a job leaves that went well."""
    steps = [
        event(2 + step, step=step, steps=num_steps, value=step / num_steps, phase="training", loss=1 / step, attempt=1)
        for step in range(1, num_steps + 1)
    ]
    return [
        event(1, "job.state", state="queued"),
        event(2, "job.state", state="running"),
        *steps,
        event(3 + num_steps, "job.state", state=state),
    ]


def as_stream(events: list[dict[str, Any]]) -> bytes:
    """Server-sent events, as ``api/stream.py`` writes them."""
    messages = (
        f"id: {item['seq']}\nevent: {item['type']}\ndata: {json.dumps(item, ensure_ascii=False)}\n\n" for item in events
    )
    return ("retry: 2000\n\n: still here\n\n" + "".join(messages)).encode()


@dataclass
class JobServer:
    """An app: one job, its log, and how each next stream ends (``cuts``: after so many bytes)."""

    log: list[dict[str, Any]] = field(default_factory=finished_log)
    job: dict[str, Any] = field(default_factory=lambda: job_view("succeeded"))
    cuts: Iterator[int | None] = field(default_factory=lambda: iter(()))
    counted: bool = True
    streams: bool = True
    hidden: frozenset[int] = frozenset()
    """Events that streams leave out, although the log has them."""
    repeats: bool = False
    """Streams begin at the beginning, whatever they are asked for."""

    def __call__(self, request: Request) -> Answer:
        if request.path == f"/v1/jobs/{JOB}":
            return Answer(body=json.dumps(self.job).encode())
        if request.path != f"/v1/jobs/{JOB}/events":
            problem = {
                "title": "Not Found",
                "status": 404,
                "code": "not_found",
                "detail": f"no such job: {request.path}",
            }
            return Answer(status=404, body=json.dumps(problem).encode(), media_type="application/problem+json")
        if "text/event-stream" in request.headers["accept"] and self.streams:
            return self._stream(int(request.headers.get("last-event-id", 0)))
        return self._page(int(request.query["after"]), int(request.query.get("limit", 50)))

    def _stream(self, after: int) -> Answer:
        events = [item for item in self.log if (item["seq"] > after or self.repeats) and item["seq"] not in self.hidden]
        body, cut = as_stream(events), next(self.cuts, None)
        return Answer(body=body, media_type="text/event-stream", cut=cut, counted=self.counted)

    def _page(self, after: int, limit: int) -> Answer:
        later = [item for item in self.log if item["seq"] > after]
        page = {"data": later[:limit], "has_more": len(later) > limit, "next_cursor": None}
        return Answer(body=json.dumps(page).encode())
