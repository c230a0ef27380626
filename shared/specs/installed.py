"""Families that other packages bring: found by entry points, so only who installs packages can add one.

Two groups, as a family is two files: ``noisemill.specs`` for everybody, ``noisemill.families`` where torch is.
"""

from collections.abc import Collection
from importlib.metadata import entry_points
from typing import Any, Final, get_args

from shared.errors import FamilyRefused
from shared.specs.tasks import Request
from shared.specs.training import TrainSpec

SPECS: Final = "noisemill.specs"
"""Group of entry points: the family's name, and the class of its spec."""
FAMILIES: Final = "noisemill.families"
"""Group of entry points: the family's name, and its ``Family``."""

_TASKS: Final = frozenset(get_args(kind.model_fields["task"].annotation)[0] for kind in get_args(Request))


def load(group: str, known: Collection[str]) -> dict[str, Any]:
    """What packages offer in ``group``, by name.

    Raises:
        FamilyRefused: it cannot be loaded, or its name is among the ``known``, or two have it.
    """
    found: dict[str, Any] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value)):
        if entry.name in known or entry.name in found:
            raise FamilyRefused(f"{entry.value}: there is a family {entry.name} already")
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            raise FamilyRefused(f"{entry.value}, for the family {entry.name}: {error}") from error
    return found


def specs(known: Collection[str]) -> dict[str, type[TrainSpec]]:
    """The specs of the families that packages bring.

    Raises:
        FamilyRefused: as ``load``, or one is no spec of a family of its name.
    """
    found = load(SPECS, known)
    for name, spec in found.items():
        if not (isinstance(spec, type) and issubclass(spec, TrainSpec)):
            raise FamilyRefused(f"{name}: {spec!r} is no subclass of TrainSpec")
        field = spec.model_fields.get("family")
        if field is None or get_args(field.annotation) != (name,):
            raise FamilyRefused(f'{name}: {spec.__name__}.family must be Literal["{name}"]')
        if unknown := set(spec.tasks) - _TASKS:
            raise FamilyRefused(f"{name}: there is no task {', '.join(sorted(unknown))}")
    return found
