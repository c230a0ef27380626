"""When leases that ran out mean nothing: after a time in which nobody reached SQL, for everybody alike."""

from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from shared.jobs import continuity

TICK, LEASE = timedelta(seconds=2), timedelta(seconds=30)


def see(session: Session, who: str = "a") -> bool:
    return continuity.see(session, who, tick=TICK, lease=LEASE)


def pass_by(session: Session, seconds: float) -> None:
    """As if SQL had slept so long, or its clock had been put forward."""
    session.execute(
        text("UPDATE named_leases SET until = until - :gone"), {"gone": timedelta(seconds=seconds)}
    )  # fmt: skip


def test_leases_mean_something_while_rounds_are_done(session: Session) -> None:
    assert see(session)
    for _ in range(20):
        pass_by(session, 14)
        assert see(session)


def test_after_half_a_lease_without_a_round_they_mean_nothing_for_a_whole_one(session: Session) -> None:
    see(session)

    pass_by(session, 16)

    assert not see(session)
    pass_by(session, 14)
    assert not see(session)
    pass_by(session, 14)
    assert not see(session)
    pass_by(session, 3)
    assert see(session)


def test_an_outage_is_one_for_whoever_comes_later_or_is_new(session: Session) -> None:
    see(session)
    pass_by(session, 3600)

    assert [see(session, who) for who in ("a", "b", "new")] == [False, False, False]


def test_who_was_stopped_itself_trusts_what_others_saw(session: Session) -> None:
    see(session, "a")
    for _ in range(4):
        pass_by(session, 10)
        see(session, "b")

    assert see(session, "a")


def test_a_clock_that_is_put_back_after_an_outage_does_not_make_it_longer(session: Session) -> None:
    see(session)
    pass_by(session, 3600)
    see(session)

    pass_by(session, -3600)

    assert see(session)
