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


def need(city: City, tenant_id: UUID) -> None:
    """A job that waits for another."""
    (job_id,) = city.line.join(tenant_id)
    change(city, job_id, "queued_at = NULL")


@pytest.fixture
def after_others(city: City) -> Mapping[str, UUID]:
    """Three who were served lately, ``rich`` most and ``away`` least; ``rich`` and ``runs`` have a worker each, and
    ``rich`` has a job in line."""
    tenants = {name: city.line.tenant(name) for name in ("away", "runs", "rich")}
    for worker in ("w1", "w2"):
        city.sign_in(worker, ["generate"])
    for name, count in (("away", 4), ("runs", 5), ("rich", 12)):
        city.line.join(tenants[name], count=count)
        for _ in range(count):
            serve(city, {tenants[name]: 60.0})
    for name, worker in (("runs", "w2"), ("rich", "w1")):
        city.line.join(tenants[name])
        city.line.start(worker)
    city.line.join(tenants["rich"])
    return tenants


def latest_start(city: City) -> float:
    """The p90 of the job in line."""
    (eta,) = [view.eta for view in city.look().values() if view.position]
    assert eta is not None
    return eta.p90


def put(city: City, tenant_id: UUID, attained: float) -> None:
    """What the tenant has on its account."""
    account = text("UPDATE shares SET attained = :attained WHERE tenant_id = :id")
    city.session.execute(account, {"attained": attained, "id": tenant_id})


def test_who_wants_nothing_but_what_waits_for_other_jobs_delays_nobody(
    city: City, after_others: Mapping[str, UUID]
) -> None:
    """Neither with its account of long ago nor as the poorest, where who comes back would begin."""
    put(city, after_others["runs"], 720)
    before = latest_start(city)

    need(city, after_others["away"])
    put(city, after_others["away"], 240)

    assert latest_start(city) == before


def test_who_comes_back_starts_where_the_poorest_stands_though_that_one_only_runs(
    city: City, after_others: Mapping[str, UUID]
) -> None:
    poor = latest_start(city)

    put(city, after_others["runs"], 720)

    assert latest_start(city) < poor


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


def test_who_is_in_no_line_takes_no_places(city: City) -> None:
    flood(city, waiting.FARTHEST)
    waits = list(city.look())

    need(city, city.line.tenant("t"))

    assert sorted(view.position or 0 for view in city.look(*waits).values()) == [*range(1, waiting.FARTHEST + 1)]


def test_a_place_is_the_same_whoever_is_asked_for_besides(city: City) -> None:
    """Lines are not read where all who are asked for stand too far back; the last that is counted does not."""
    flood(city, waiting.FARTHEST + 50)
    together = city.look()
    line = sorted(together, key=lambda job_id: (together[job_id].position, job_id))

    alone = [city.look(job_id)[job_id] for job_id in (line[0], *line[waiting.FARTHEST - 2 : waiting.FARTHEST + 2])]

    far = waiting.FARTHEST + 1
    assert [view.position for view in alone] == [1, far - 2, far - 1, far, far]
    assert city.look(line[0], line[-1])[line[-1]].position == far
