"""The rules that are searched, by name. Numbers are upper bounds of how often the adversary does a thing."""

from dataclasses import replace
from typing import Final

from tests.model.healing import Ways
from tests.model.operations import Bounds
from tests.model.world import Left, Rules

BY_BELL: Final = Ways(bell=True, poll=False, redispatch=True)
BY_POLL: Final = Ways(bell=False, poll=True, redispatch=False)
BY_OUTBOX: Final = Ways(bell=True, poll=False, redispatch=False)

EVERYTHING: Final = Rules(heals_by=(BY_BELL, BY_POLL), left=Left(interruptions=0))
"""All faults and all layers: two workers, two attempts. Interruptions are in ``WORKERS``, which it would double."""

WORKERS: Final = Rules(
    heals_by=(BY_POLL,),
    relay=False,
    redispatch=False,
    left=Left(jumps=2, cancels=0, pauses=0, resumes=0, interruptions=1),
)
"""Workers that look into SQL by themselves and are interrupted, and a client who only waits."""

REQUESTS: Final = replace(WORKERS, workers=1, left=Left(jumps=1))
"""The same with one worker at a time and all that a client may ask for."""

OUTAGES: Final = replace(
    WORKERS, workers=1, bounds=Bounds(max_attempts=1), left=Left(jumps=2, cancels=0, interruptions=0, outages=3)
)
"""Storage that is away again and again, for longer than the job waits; one attempt may fail."""

OUTBOX: Final = Rules(
    heals_by=(BY_OUTBOX,),
    workers=1,
    poll=False,
    redispatch=False,
    losses=False,
    bounds=Bounds(backoff=False),
    left=Left(jumps=1, cancels=0),
    disturb=False,
)
"""The outbox alone, with a broker that loses nothing: the layers that would heal its bugs are switched off."""

DEADLINE: Final = Rules(
    heals_by=(BY_BELL, BY_POLL),
    workers=1,
    bounds=Bounds(deadline=True),
    left=Left(cancels=0, interruptions=0),
    disturb=False,
)
"""A job that must start in time."""

WIDE: Final = Rules(
    heals_by=(BY_BELL, BY_POLL),
    workers=3,
    bounds=Bounds(max_attempts=3),
    left=Left(jumps=3),
)
"""Three workers, three attempts, three jumps."""
