"""``Prefer: wait=N`` and ``respond-async`` (RFC 7240)."""

import re
from typing import Final

LONGEST_WAIT: Final = 60
_WAIT: Final = re.compile(r'wait\s*=\s*"?(\d{1,6})"?')


def seconds_to_wait(preferences: list[str]) -> int:
    """How long the client would like to wait for the end, at most ``LONGEST_WAIT``; unknown preferences are ignored."""
    for preference in ",".join(preferences).split(","):
        name = preference.partition(";")[0].strip().lower()
        if name == "respond-async":
            return 0
        if found := _WAIT.fullmatch(name):
            return min(int(found[1]), LONGEST_WAIT)
    return 0
