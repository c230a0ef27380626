"""Whether leases that ran out mean anything: not after a time in which nobody could renew them.

While SQL is away, all leases run out, and they do at once when the database's clock is put forward. Afterwards whoever
comes back first would decide, and end attempts whose workers live and are about to renew them or to hand them back.

Two named leases tell. ``rounds`` is kept by everyone who keeps house, or would: it runs out where none of them reached
SQL. Then ``outage`` is held for as long as leases mean nothing. As rows they tell the same to a process that was
stopped meanwhile, or is new.
"""

from datetime import timedelta
from typing import Final

from sqlalchemy import text
from sqlalchemy.orm import Session

_SEE: Final = text("""
WITH last AS MATERIALIZED (
    SELECT until FROM named_leases WHERE name = 'rounds' FOR UPDATE
), kept AS (
    INSERT INTO named_leases (name, holder, until) VALUES ('rounds', :who, clock_timestamp() + :gap)
    ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
), noticed AS (
    INSERT INTO named_leases (name, holder, until)
    SELECT 'outage', :who, clock_timestamp() + :patience FROM last WHERE until < clock_timestamp()
    ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
    RETURNING until
)
SELECT NOT EXISTS (SELECT FROM noticed) AND NOT EXISTS (
    SELECT FROM named_leases
    WHERE name = 'outage' AND until BETWEEN clock_timestamp() AND clock_timestamp() + :patience
)
""")


def see(session: Session, who: str, *, tick: timedelta, lease: timedelta) -> bool:
    """Do a round, as everybody does every ``tick``, of jobs that are held under a ``lease``.

    After half a lease without any they mean nothing for a whole one. An outage that seems to last for longer was
    noticed before the clock was put back.

    Returns:
        Whether leases that ran out mean something.
    """
    gap = max(lease / 2, tick * 3)
    return bool(session.scalar(_SEE, {"who": who, "gap": gap, "patience": lease}))
