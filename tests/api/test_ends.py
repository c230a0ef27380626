"""What is answered together fails alone."""

from dataclasses import fields
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Engine, text

from api.ends import Awaited, _look
from api.parts import Parts
from api.threads import ThreadParts, run
from api.views import Links
from shared.ids import parse
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
