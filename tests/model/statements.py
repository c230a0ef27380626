"""Statements that were built once are used again: building one costs more than PostgreSQL needs to execute it.

What an operation builds depends on the operation alone (job, fence, error), never on rows: ``replay.py`` runs
without this and would see a difference.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from shared.jobs import attempts, claims, requests, upkeep
from tests.model.database import Operation

_BUILDERS = ("move", "move_by_case", "append_event")


class Statements:
    """What each operation has built, in order."""

    def __init__(self) -> None:
        self._built: dict[tuple[Any, ...], Any] = {}
        self._operation: Operation | None = None
        self._calls = 0

    def start(self, operation: Operation) -> None:
        """From now on this operation runs."""
        self._operation, self._calls = operation, 0

    def remembering(self, name: str, build: Callable[..., Any]) -> Callable[..., Any]:
        def built(first: Any, *conditions: Any, **values: Any) -> Any:
            self._calls += 1
            targets = tuple(target for target, _ in first) if isinstance(first, list) else first
            key = (self._operation, self._calls, name, targets, len(conditions), *values)
            if key not in self._built:
                self._built[key] = build(first, *conditions, **values)
            return self._built[key]

        return built


@contextmanager
def remembered() -> Iterator[Statements]:
    """While this is open, the product's builders of statements remember what they built."""
    statements = Statements()
    with pytest.MonkeyPatch.context() as patch:
        for module in (attempts, claims, requests, upkeep):
            for name in _BUILDERS:
                if build := getattr(module, name, None):
                    patch.setattr(module, name, statements.remembering(name, build))
        yield statements
