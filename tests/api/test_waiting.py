"""Places in the queue are those in which jobs are then claimed."""

from collections.abc import Iterator, Mapping
from uuid import UUID

import pytest
from sqlalchemy import text

from api import waiting
from shared.jobs.state import Priority
from shared.wire import QueueView
from tests.api.city import City
from tests.shared.line import SETTINGS

AGEING = SETTINGS.ageing.total_seconds()
SERVED = {10.0: 18, 31.0: 6, 37.0: 5}
"""Seconds that jobs of each tenant take, and how many it has had: about as much as the others, and no ties to come."""


@pytest.fixture
def city(database: str) -> Iterator[City]:
    """Without workers; what serves a line is ``serve``."""
    with City(database, num_workers=0) as city:
        yield city


def serve(city: City, seconds: Mapping[UUID, float]) -> UUID:
    """Run the next job for as long as its tenant's jobs take."""
    claim = city.line.start()
    city.sleep(seconds[claim.tenant_id])
    city.line.finish(claim)
    return claim.job_id


def in_order(said: dict[UUID, QueueView]) -> list[UUID]:
    places = {job_id: view.position or 0 for job_id, view in said.items()}
    assert sorted(places.values()) == list(range(1, len(said) + 1))
    return sorted(places, key=places.__getitem__)


def change(city: City, job_id: UUID, what: str) -> None:
    city.session.execute(text(f"UPDATE jobs SET {what} WHERE id = :id"), {"id": job_id})


def test_jobs_are_claimed_in_the_order_of_their_places(city: City) -> None:
    """Three tenants whose jobs differ, and who all asked for several priorities."""
    seconds = {city.line.tenant(f"jobs of {usual} s"): usual for usual in SERVED}
    for tenant_id, usual in seconds.items():
        city.line.join(tenant_id, count=SERVED[usual])
        for _ in range(SERVED[usual]):
            serve(city, seconds)
    for tenant_id in seconds:
        for priority, count in ((Priority.NORMAL, 6), (Priority.LOW, 2), (Priority.HIGH, 1)):
            city.line.join(tenant_id, priority=priority, count=count)

    said = in_order(city.look())

    assert [serve(city, seconds) for _ in said] == said


def test_a_line_that_was_not_served_for_long_has_risen(city: City) -> None:
    low, urgent = city.line.tenant("low"), city.line.tenant("urgent")
    waited = city.line.join(low, priority=Priority.LOW, count=2)
    city.sleep(2 * AGEING)
    came = city.line.join(urgent, priority=Priority.HIGH, count=2)

    assert in_order(city.look()) == [waited[0], *came, waited[1]]


def test_a_line_rises_though_its_tenant_is_served_in_another_queue(city: City) -> None:
    low, urgent = city.line.tenant("low"), city.line.tenant("urgent")
    (waited,) = city.line.join(low, priority=Priority.LOW, queue="train")
    city.sleep(2 * AGEING)
    city.line.join(low, priority=Priority.LOW)
    serve(city, {low: 1})
    (came,) = city.line.join(urgent, priority=Priority.HIGH, queue="train")

    said = in_order(city.look())

    assert said == [waited, came]
    assert [city.line.start(worker, queues=["train"]).job_id for worker in "ab"] == said


def test_a_job_that_backs_off_is_passed_over(city: City) -> None:
    first, second = city.line.join(city.line.tenant("t"), count=2)
    change(city, first, "not_before = clock_timestamp() + interval '1 hour'")

    said = city.look()

    assert (said[second].position, said[first].reason) == (1, "backing_off")


def test_queues_that_share_workers_are_one_line(city: City) -> None:
    first, second, third = city.line.join(city.line.tenant("t"), count=3)
    change(city, second, "queue = 'train'")
    city.sign_in("w1", ["generate"])
    city.sign_in("w2", ["train"])
    apart = city.look()

    city.sign_in("w2", ["train", "generate"])
    together = city.look()

    assert [apart[job_id].position for job_id in (first, second, third)] == [1, 1, 2]
    assert [together[job_id].position for job_id in (first, second, third)] == [1, 2, 3]


@pytest.mark.parametrize("gone", ["state = 'draining'", "seen_at = clock_timestamp() - interval '1 minute'"])
def test_a_worker_that_takes_nothing_more_is_none(city: City, gone: str) -> None:
    (job_id,) = city.line.join(city.line.tenant("t"))
    city.sign_in("w1", ["generate"])
    before = city.look()[job_id].reason

    city.session.execute(text(f"UPDATE workers SET {gone}"))

    assert (before, city.look()[job_id].reason) == ("waiting_for_worker", "no_compatible_worker")


def flood(city: City, count: int) -> None:
    """So many jobs of one tenant."""
    many = text("""
        INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, state, max_attempts)
        SELECT gen_random_uuid(), :tenant_id, 'train', 'train', '{}', '{}', 'waits', 'queued', 3
        FROM generate_series(1, :count)""")
    city.session.execute(many, {"tenant_id": city.line.tenant("flood"), "count": count})


def test_places_far_back_are_not_counted(city: City) -> None:
    flood(city, waiting.FARTHEST + 50)

    places = sorted(view.position for view in city.look().values())

    assert places == [*range(1, waiting.FARTHEST + 1), *[waiting.FARTHEST + 1] * 50]


def test_a_place_is_the_same_whoever_is_asked_for_besides(city: City) -> None:
    """Lines are not read where all who are asked for stand too far back; the last that is counted does not."""
    flood(city, waiting.FARTHEST + 50)
    together = city.look()
    line = sorted(together, key=lambda job_id: (together[job_id].position, job_id))

    alone = [city.look(job_id)[job_id] for job_id in (line[0], *line[waiting.FARTHEST - 2 : waiting.FARTHEST + 2])]

    far = waiting.FARTHEST + 1
    assert [view.position for view in alone] == [1, far - 2, far - 1, far, far]
    assert city.look(line[0], line[-1])[line[-1]].position == far
