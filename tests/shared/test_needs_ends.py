"""A job that waits for a model that will never be made ends with whoever was to make it, and says why."""

from collections.abc import Callable
from uuid import UUID

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from shared.jobs import needs
from shared.jobs.state import JobState
from tests.shared.desk import Desk
from tests.shared.needing import INFO, cancel, diffuse, draw, expire, fail, lose, ref, stop, succeed


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (cancel, "was canceled"),
        (stop, "was canceled"),
        (expire, "expired"),
        (fail, "failed: the loss is no number"),
        (lose, "failed: the worker stopped answering; its lease ran out"),
    ],
)
def test_who_waits_ends_with_whom_it_waits_for_and_says_why(
    desk: Desk, end: Callable[[Desk, UUID], object], told: str
) -> None:
    first = desk.submit()
    second = diffuse(desk, autoencoder=ref(first))
    third, beside = draw(desk, ref(second)), draw(desk, ref(first))
    desk.pause(second.id)

    end(desk, first.id)

    ended = [desk.job(job.id) for job in (second, third, beside)]
    assert [(job.state, job.error_code) for job in ended] == [(JobState.FAILED, "dependency_failed")] * 3
    cause = f"{ref(first)}, whose model it needs, {told}"
    assert ended[0].error_message == ended[2].error_message == cause
    assert ended[1].error_message == f"{ref(second)}, whose model it needs, failed: {cause}"


def test_a_model_that_is_not_what_was_told_of_it_ends_who_waits_by_name(desk: Desk) -> None:
    first = desk.submit()
    second = draw(desk, ref(first))

    succeed(desk, desk.claim(), INFO | {"shape": [1, 1, 8]})

    assert (desk.job(second.id).state, desk.job(second.id).error_code) == (JobState.FAILED, "dependency_unfit")


@pytest.mark.parametrize("end", [cancel, expire, fail, lose])
def test_of_all_who_end_with_a_job_whoever_commits_has_to_tell(desk: Desk, end: Callable[[Desk, UUID], object]) -> None:
    first, told = desk.submit(), list[UUID]()
    second = diffuse(desk, autoencoder=ref(first))
    third = draw(desk, ref(second))

    def note(session: Session) -> None:
        told.extend(needs.news(session))

    event.listen(Session, "after_commit", note)
    try:
        end(desk, first.id)
    finally:
        event.remove(Session, "after_commit", note)

    assert told == [second.id, third.id]
