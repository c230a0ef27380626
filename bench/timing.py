"""Contestants that take turns: what else the machine does meanwhile hits all of them alike.

Each is timed in blocks of calls, in rounds that go through the contestants forwards and backwards by turns, on the wall
clock with the device waited for before and after. One that fails is told of by its error and leaves the others alone.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final

import torch

Step = Callable[[], object]
Maker = Callable[[], Step]

MOST_CALLS: Final = 2000
LONG_SECONDS: Final = 2.0
"""What takes so long is warm after one call."""
OUT_OF_TIME: Final = "no time was left"


@dataclass(kw_only=True)
class Timing:
    """Seconds of one unit of work, one number for each round; or why there are none."""

    seconds: list[float] = field(default_factory=list[float])
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        if not self.seconds:
            return {"error": self.error or OUT_OF_TIME}
        told = {
            "seconds": self.median,
            "low": min(self.seconds),
            "high": max(self.seconds),
            "rounds": len(self.seconds),
        }
        return told | ({"error": self.error} if self.error else {})


@dataclass(kw_only=True)
class _Contestant:
    step: Step
    calls: int
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How long and how often is timed, on which device."""

    device: torch.device
    rounds: int = 5
    block_seconds: float = 0.3
    deadline: float = inf
    """Of ``time.monotonic``: nothing begins after it."""

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def compete(self, makers: Mapping[str, Maker], units: Mapping[str, int] | None = None) -> dict[str, Timing]:
        """Time what each maker makes; ``units`` says how many units of work one call does, if not one."""
        timings = {name: Timing() for name in makers}
        ready: dict[str, _Contestant] = {}
        for name, make in makers.items():
            if contestant := self._guarded(timings[name], lambda make=make, name=name: self._warm(make, timings[name])):
                ready[name] = contestant
        for number in range(self.rounds):
            for name in list(ready) if number % 2 == 0 else list(reversed(ready)):
                contestant = ready[name]
                seconds = self._guarded(contestant.timing, lambda one=contestant: self._elapsed(one.step, one.calls))
                if seconds is None:
                    del ready[name]
                else:
                    contestant.timing.seconds.append(seconds / (units or {}).get(name, 1))
        return timings

    def _guarded(self, timing: Timing, run: Callable[[], Any]) -> Any:
        if self.is_over:
            timing.error = OUT_OF_TIME
            return None
        try:
            return run()
        except Exception as error:  # noqa: BLE001 - one broken contestant does not take the others down
            timing.error = described(error)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _warm(self, make: Maker, timing: Timing) -> _Contestant:
        step = make()
        seconds = self._elapsed(step, 1)
        if seconds < LONG_SECONDS:
            self._elapsed(step, 2)
            seconds = self._elapsed(step, 1)
        calls = int(self.block_seconds / max(seconds, 1e-9))
        return _Contestant(step=step, calls=min(max(calls, 1), MOST_CALLS), timing=timing)

    def _elapsed(self, step: Step, calls: int) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(calls):
            step()
        self._wait()
        return (time.perf_counter() - began) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def described(error: Exception) -> str:
    """The error in a line, and where it was raised."""
    places = traceback.extract_tb(error.__traceback__)
    place = f" ({places[-1].filename.rsplit('/', 1)[-1]}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {str(error)[:300]}{place}"
