"""What a code says of whether another attempt may go well."""

import pytest

from shared.errors import JobError, NanLoss, Stalled, StorageUnavailable, TimeLimitExceeded, WorkerLost, retryable_codes


@pytest.mark.parametrize("error", [StorageUnavailable, WorkerLost])
def test_the_code_of_an_error_after_which_another_attempt_may_go_well_says_so(error: type[JobError]) -> None:
    assert error.code in retryable_codes()


@pytest.mark.parametrize("error", [JobError, NanLoss, TimeLimitExceeded])
def test_the_code_of_one_that_would_come_again_does_not(error: type[JobError]) -> None:
    assert error.code not in retryable_codes()


def test_who_stalled_is_tried_again_though_its_code_is_that_of_who_took_too_long() -> None:
    assert Stalled.retryable
    assert Stalled.code not in retryable_codes()
