"""What is answered together fails alone, and whoever asks after the end is told to come again."""

import asyncio
from dataclasses import fields
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from sqlalchemy import Engine, text

from api.app import create_app
from api.ends import Awaited, Ends, _look
from api.news import News
from api.parts import Parts
from api.threads import ThreadParts, run
from api.together import Together
from api.views import Links
from shared.ids import parse, uuid7
from shared.settings import Settings
from shared.wire import JobView
from tests.api.support import Owner, claim, succeed


def test_an_end_that_cannot_be_shown_fails_for_who_waits_for_that_alone(
    owner: Owner, engine: Engine, settings: Settings
) -> None:
    ended = [parse("job", owner.train()["id"]) for _ in range(3)]
    for job_id in ended:
        succeed(engine, claim(engine, f"job_{job_id.hex}"))
    with engine.begin() as connection:
        garbled = text("""UPDATE jobs SET labels = '{"a": [1]}' WHERE id = :id""")
        connection.execute(garbled, {"id": ended[1]})
    unused = dict[str, Any].fromkeys(field.name for field in fields(Parts))
    parts = ThreadParts(**unused | {"settings": settings, "thread_engine": engine})

    answers = run(_look(parts, [Awaited(job_id=job_id, links=Links("http://here")) for job_id in ended]))

    assert [type(answer) for answer in answers] == [JobView, ValidationError, JobView]


@pytest.mark.parametrize("method", ["GET", "POST"])  # the latter goes past FastAPI
def test_who_comes_when_nobody_is_left_to_answer_is_told_to_come_again(settings: Settings, method: str) -> None:
    app = create_app(settings)
    app.state.parts, app.state.callers = None, Together[bytes, None](lambda asked: [None] * len(asked), most=1)
    app.state.callers.start()
    app.state.callers.stop()

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.request(method, "/v1/jobs", headers={"Authorization": "Bearer key"}, json={})

    answer = asyncio.run(ask())

    assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (503, "unavailable", "2")


def test_who_waits_for_an_end_while_the_server_ends_is_told_of_its_job_all_the_same(settings: Settings) -> None:
    """An error would have the client submit it again."""
    unused = dict[str, Any].fromkeys(field.name for field in fields(Parts))
    ends, news, job_id = Ends(Parts(**unused)), News(None, settings.broker), uuid7()
    ends.start()
    ends.stop()

    async def wait() -> JobView | None:
        with news.of(job_id, only_ends=True) as listener:
            listener.ring()
            return await ends.wait(Awaited(job_id=job_id, links=Links("http://here")), listener, 0.1)

    assert asyncio.run(wait()) is None
