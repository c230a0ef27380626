"""The rules that are searched, by name. Numbers are upper bounds of how often the adversary does a thing."""

from typing import Final

from tests.model.healing import Ways
from tests.model.operations import Bounds
from tests.model.world import Left, Rules

BY_BELL: Final = Ways(bell=True, poll=False, redispatch=True)
BY_POLL: Final = Ways(bell=False, poll=True, redispatch=False)
BY_OUTBOX: Final = Ways(bell=True, poll=False, redispatch=False)

EVERYTHING: Final = Rules(heals_by=(BY_BELL, BY_POLL))
"""All faults and all layers: two workers, two attempts."""

OUTBOX: Final = Rules(
    heals_by=(BY_OUTBOX,),
    workers=1,
    poll=False,
    redispatch=False,
    losses=False,
    bounds=Bounds(backoff=False),
    left=Left(jumps=1),
)
"""The outbox alone, with a broker that loses nothing: the layers that would heal its bugs are switched off."""

DEADLINE: Final = Rules(
    heals_by=(BY_BELL, BY_POLL),
    workers=1,
    bounds=Bounds(deadline=True),
    left=Left(cancels=0, interruptions=0),
)
"""A job that must start in time."""

WIDE: Final = Rules(
    heals_by=(BY_BELL, BY_POLL), workers=3, bounds=Bounds(max_attempts=3), left=Left(jumps=3, interruptions=1)
)
"""Three workers, three attempts, three jumps."""
