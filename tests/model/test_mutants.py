"""The gate: the search that finds nothing wrong in the product finds each seeded bug, and says how to get there."""

from dataclasses import replace

import pytest
from sqlalchemy import Connection

from tests.model import planting
from tests.model.database import Database
from tests.model.mutants import MUTANTS, Mutant, find
from tests.model.search import searching
from tests.model.sizes import BY_BELL, OUTBOX, WORKERS
from tests.model.world import Left


@pytest.fixture(scope="module")
def known(connection: Connection) -> Database:
    """What the searches learn of the product itself, which finds nothing."""
    with searching(connection, WORKERS) as search:
        search.run()
    return search.database


@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.equivalent is None], ids=lambda one: one.name)
def test_a_seeded_bug_is_found(connection: Connection, known: Database, mutant: Mutant) -> None:
    broken = find(connection, mutant, known)

    print(broken)
    assert broken is not None
    assert broken.promise == mutant.breaks


@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.equivalent], ids=lambda one: one.name)
def test_a_change_that_is_called_harmless_is(connection: Connection, known: Database, mutant: Mutant) -> None:
    assert find(connection, mutant, known) is None


def test_a_redispatcher_hides_a_missing_bell(connection: Connection) -> None:
    """Why the outbox is searched with the other layers off."""
    healed = replace(OUTBOX, heals_by=(BY_BELL,), redispatch=True, left=Left(1, 0, 0, 0, 0))
    mutant = Mutant(name="no bell for a new job", plant=planting.submit_without_a_bell, rules=healed)

    assert find(connection, mutant) is None
