"""Workers that are killed, and workers that are replaced one after the other."""

import signal
import time
from datetime import timedelta
from uuid import UUID

import psutil
import pytest
from sqlalchemy import text

from shared.jobs.state import AttemptOutcome, JobState, JobType
from tests.drills.conftest import LEASE_SECONDS, Report, Site, StartSite

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

DRAIN = timedelta(seconds=20)


def worker_of(site: Site, job_id) -> str:
    return (site.get(job_id).worker or "").split("@")[0]


def short(site: Site) -> UUID:
    return site.job(["steps", 20, 0.05], ["publish", "sample", "a", "x"])


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_the_job_of_a_killed_worker_starts_again_within_its_lease_and_five_seconds(
    start_site: StartSite, wait_until, report: Report, victim: str
) -> None:
    site = start_site(workers=2)
    waits = []

    for _ in range(3):
        job_id = site.job(["steps", 10_000, 0.02], max_attempts=2)
        wait_until(lambda job_id=job_id: site.get(job_id).step > 0, timeout=90)
        name = worker_of(site, job_id)
        processes = wait_until(lambda name=name: site.processes(name))
        getattr(processes, victim).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda job_id=job_id: site.get(job_id).fence == 2, timeout=60)
        waits.append(round(time.monotonic() - killed, 2))
        assert site.attempts(job_id)[0].outcome == AttemptOutcome.LOST
        with site.engine.begin() as connection:
            connection.execute(text("UPDATE jobs SET state = 'canceling' WHERE id = :id"), {"id": job_id})
        wait_until(lambda job_id=job_id: site.state(job_id) == JobState.CANCELED, timeout=30)
        wait_until(lambda: all(map(site.processes, site.installation.workers)), timeout=90)

    report(victim=victim, seconds=waits, bound=LEASE_SECONDS + 5)
    assert max(waits) < LEASE_SECONDS + 5


def test_ten_rolling_restarts_under_load_lose_nothing_and_count_nothing(
    start_site: StartSite, wait_until, report: Report
) -> None:
    site = start_site(workers=2)
    shorts = [short(site) for _ in range(60)]
    trainings = [site.job(["train", 1500, 0.02, 100], type=JobType.TRAIN) for _ in range(6)]
    exits = []

    for _ in range(10):
        for name in site.installation.workers:
            processes = wait_until(lambda name=name: site.processes(name), timeout=120)
            wait_until(site.busy, timeout=60)
            site.installation.end(name, signal.SIGTERM)
            asked = time.monotonic()
            psutil.wait_procs([processes.parent], timeout=60)
            exits.append(round(time.monotonic() - asked, 2))
            _, left = psutil.wait_procs([processes.child, processes.runner], timeout=3)
            assert not left
            shorts += [short(site) for _ in range(3)]
    everything = shorts + trainings
    wait_until(lambda: all(site.state(job_id).is_final for job_id in everything), timeout=900, every=1)

    jobs = [site.get(job_id) for job_id in everything]
    lost = sum(job.state != JobState.SUCCEEDED for job in jobs)
    counted = {name: sum(getattr(job, name) for job in jobs) for name in ("failures", "losses", "interruptions")}
    bound = DRAIN.total_seconds() + 5
    report(restarts=len(exits), jobs=len(jobs), lost=lost, **counted, exit_max_s=max(exits), exit_bound_s=bound)
    assert (lost, counted["failures"], counted["losses"]) == (0, 0, 0)
    assert counted["interruptions"] > 0
    assert max(exits) < bound
    digests = {next(a.sha256 for a in site.artifacts(t) if a.kind == "weights") for t in trainings}
    assert len(digests) == 1
