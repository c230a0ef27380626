"""Storage that is away for minutes."""

import time
from datetime import timedelta

import pytest

from shared.jobs.state import JobState, JobType
from tests.drills.conftest import Report, StartSite

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

OUTAGE = timedelta(minutes=6)


def test_an_outage_of_storage_of_six_minutes_fails_no_job(start_site: StartSite, wait_until, report: Report) -> None:
    site = start_site(workers=2)
    # As many as there are workers: each tries again and again, and none waits for a device meanwhile.
    jobs = [site.job(["steps", 20, 0.05], ["publish", "sample", "a", "x"], max_attempts=1)]
    jobs += [site.job(["train", 400, 0.02, 50], type=JobType.TRAIN, max_attempts=1)]
    wait_until(lambda: any(site.get(job_id).step > 0 for job_id in jobs), timeout=90)

    site.installation.s3.faults.begin("error", share=1)
    time.sleep(OUTAGE.total_seconds())
    assert not any(site.state(job_id).is_final for job_id in jobs[1:])
    site.installation.s3.faults.end()
    ended = time.monotonic()
    wait_until(lambda: all(site.state(job_id).is_final for job_id in jobs), timeout=900)

    rows = [site.get(job_id) for job_id in jobs]
    report(
        outage=OUTAGE.total_seconds(),
        seconds_until_all_were_done=round(time.monotonic() - ended, 1),
        postponed=[job.interruptions for job in rows],
    )
    assert {job.state for job in rows} == {JobState.SUCCEEDED}
    assert sum(job.failures + job.losses for job in rows) == 0
    assert max(job.interruptions for job in rows) > 1
