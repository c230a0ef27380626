"""The gate: the search that finds nothing wrong in the product finds each seeded bug, and says how to get there."""

from dataclasses import replace

import pytest
from sqlalchemy import Connection

from tests.model import planting
from tests.model.healing import Ways
from tests.model.mutants import MUTANTS, Mutant, find
from tests.model.sizes import OUTBOX


@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.equivalent is None], ids=lambda one: one.name)
def test_a_seeded_bug_is_found(connection: Connection, mutant: Mutant) -> None:
    broken = find(connection, mutant)

    print(broken)
    assert broken is not None


@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.equivalent], ids=lambda one: one.name)
def test_a_change_that_is_called_harmless_is(connection: Connection, mutant: Mutant) -> None:
    assert find(connection, mutant) is None


def test_a_redispatcher_hides_a_missing_bell(connection: Connection) -> None:
    """Why the outbox is searched with the other layers off."""
    both = Ways(bell=True, poll=False, redispatch=True)
    mutant = Mutant(
        name="", plant=planting.submit_without_a_bell, rules=replace(OUTBOX, heals_by=(both,), redispatch=True)
    )

    assert find(connection, mutant) is None
