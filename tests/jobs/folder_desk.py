"""The second real implementation of ``worker.run.Desk``: jobs come one after another, and their ends are kept."""

from collections.abc import Callable
from typing import Any

from tests.jobs.folder_run import FolderRun
from worker.jobs.generate import serve


class FolderDesk:
    """One more of its jobs comes whenever it is asked for arrivals, so at the next step."""

    device = "cpu"

    def __init__(self, *runs: FolderRun) -> None:
        self._runs, self._coming = runs, list(runs)
        self.rooms: list[int] = []
        """What was said of the room there is."""
        self.settled: dict[int, Any] = {}
        """Results and errors by place."""

    def arrivals(self) -> list[FolderRun]:
        return [self._coming.pop(0)] if self._coming else []

    def room(self, samples: int) -> None:
        self.rooms.append(samples)

    def settle(self, run: FolderRun, result: Callable[[], Any]) -> None:
        try:
            self.settled[self._runs.index(run)] = result()
        except Exception as error:  # noqa: BLE001  (it is what tests look at)
            self.settled[self._runs.index(run)] = error


def served(*runs: FolderRun) -> dict[int, Any]:
    """What becomes of jobs that come one after another, each at the next step; results and errors by place."""
    desk = FolderDesk(*runs)
    serve(desk)
    return desk.settled
