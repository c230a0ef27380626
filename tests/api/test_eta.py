"""Estimates are honest: jobs start when they were said to, as often as was said."""

import math
from collections.abc import Iterator
from random import Random

import pytest

from api.eta import Forecast, Place, QueueFacts, WorkerFacts
from shared.jobs.state import Priority
from tests.api.city import Arrival, City, Story

MEANS = {"quick": 20.0, "usual": 60.0, "slow": 120.0}
"""Seconds that jobs of each tenant take on average."""
NUM_WORKERS = 3
LOAD = 0.95


def duration(random: Random, mean: float) -> float:
    """Log-normal, with a standard deviation of 0.8 means: some jobs take many times as long as most."""
    variance = math.log(1 + 0.8**2)
    return random.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))


def arrivals(seed: int, count: int) -> Iterator[Arrival]:
    """Tenants who submit whenever they like, so that the workers are just not overrun."""
    random, moment = Random(seed), 0.0
    for _ in range(count):
        moment += random.expovariate(LOAD * NUM_WORKERS / (sum(MEANS.values()) / len(MEANS)))
        tenant = random.choice(list(MEANS))
        priority = random.choices(list(Priority), weights=[1, 3, 1])[0]
        yield Arrival(at=moment, tenant=tenant, seconds=duration(random, MEANS[tenant]), priority=priority)


def share(stories: list[Story], bound: str) -> float:
    """Of how many jobs the start was not later than said."""
    kept = [story for story in stories if story.said.eta and story.waited <= getattr(story.said.eta, bound) + 0.05]
    return len(kept) / len(stories)


@pytest.mark.timeout(900)
def test_jobs_start_by_their_p50_about_half_the_time_and_by_their_p90_mostly(database: str) -> None:
    with City(database, num_workers=NUM_WORKERS) as city:
        stories = city.live(arrivals(seed=1, count=300))

    waiting = [story for story in stories if story.said.eta and story.said.eta.p90 > 0]
    assert len(waiting) > 200
    assert 0.35 <= share(waiting, "p50") <= 0.65
    assert 0.80 <= share(waiting, "p90") <= 0.98


def queue(*workers: WorkerFacts, shapes: list[float], head: list[float] | None = None) -> QueueFacts:
    return QueueFacts(workers=workers, shapes=shapes, head=head or [], rivals=[])


def place(position: int, work: float) -> Place:
    return Place(tenant="t", position=position, rank=1, work=work, turn=0.0)


IDLE = WorkerFacts(elapsed=None, remaining=None, usual=None)
EVEN = [1.0] * 20


def test_an_idle_worker_starts_at_once() -> None:
    eta = Forecast(queue(IDLE, shapes=EVEN)).at(place(1, 0))

    assert eta is not None and (eta.p50, eta.p90) == (0, 0)


def test_what_a_running_attempt_still_needs_is_what_it_says_or_what_is_left_of_the_usual() -> None:
    says = WorkerFacts(elapsed=50, remaining=400, usual=60)
    silent = WorkerFacts(elapsed=50, remaining=None, usual=60)

    etas = [Forecast(queue(worker, shapes=EVEN)).at(place(1, 0)) for worker in (says, silent)]

    assert [eta and eta.p50 for eta in etas] == [400, 10]


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("position", [5, 33, 34, 101])
def test_jobs_of_one_length_start_in_waves(num_workers: int, position: int) -> None:
    """Also where the line is too long to be looked at job by job."""
    facts = queue(*[IDLE] * num_workers, shapes=EVEN, head=[60.0] * min(32, position))

    eta = Forecast(facts).at(place(position, 60.0 * (position - 1)))

    assert eta is not None
    assert eta.p50 == pytest.approx((position - 1) // num_workers * 60, abs=60)


def test_nothing_is_told_where_nothing_is_known() -> None:
    few = Forecast(queue(IDLE, shapes=EVEN[:4])).at(place(1, 0))
    nobody = Forecast(queue(shapes=EVEN)).at(place(1, 0))

    assert (few, nobody) == (None, None)


def test_a_job_that_backs_off_does_not_start_before() -> None:
    eta = Forecast(queue(IDLE, shapes=EVEN)).at(place(1, 0), backoff=17.0)

    assert eta is not None and eta.p50 == 17.0
