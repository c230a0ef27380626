"""Submitting, looking at, listing and canceling jobs."""

from tests.api.conftest import Owner


def test_a_submitted_job_is_queued(owner: Owner) -> None:
    view = owner.train()
    assert view["state"] == "queued"
