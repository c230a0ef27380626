"""The schema that the migrations make: what the tables say, there and back again."""

from collections.abc import Iterator

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, text
from sqlmodel import SQLModel

import shared.jobs.alias_rows
import shared.jobs.need_rows
import shared.jobs.rows  # noqa: F401
from shared.migrations import alembic_config, migrate

REVISIONS = [
    script.revision for script in ScriptDirectory.from_config(alembic_config("postgresql://x")).walk_revisions()
]
"""Newest first."""


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    migrate(empty_database)
    engine = create_engine(empty_database)
    yield engine
    engine.dispose()


def tables(engine: Engine) -> dict[str, list[str]]:
    """Every column, index and constraint, by table."""
    described = text("""
        SELECT table_name AS of, 'column ' || column_name || ' ' || data_type || ' ' || is_nullable AS what
            FROM information_schema.columns WHERE table_schema = 'public'
        UNION ALL SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT conrelid::regclass::text, conname || ' ' || pg_get_constraintdef(oid)
            FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
        ORDER BY 1, 2
    """)
    found: dict[str, list[str]] = {}
    with engine.connect() as connection:
        for row in connection.execute(described):
            found.setdefault(row.of, []).append(row.what)
    return {table: sorted(found[table]) for table in found if table != "alembic_version"}


def test_the_migrations_make_the_tables_that_the_code_declares(engine: Engine) -> None:
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), SQLModel.metadata)

    assert differences == []


def test_each_migration_can_be_taken_back_and_made_again(engine: Engine, empty_database: str) -> None:
    config = alembic_config(empty_database)
    whole = tables(engine)

    for revision in REVISIONS[:-1]:
        before = tables(engine)
        command.downgrade(config, "-1")
        without = tables(engine)
        command.upgrade(config, "+1")
        assert tables(engine) == before != without, revision
        command.downgrade(config, "-1")
    command.downgrade(config, "base")
    assert tables(engine) == {}
    migrate(empty_database)

    assert tables(engine) == whole


def test_a_key_that_may_train_may_move_aliases_after_the_migration_that_brings_them(
    engine: Engine, empty_database: str
) -> None:
    command.downgrade(alembic_config(empty_database), "0003")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO tenants (id, name) VALUES (gen_random_uuid(), 't')"))
        for name, scopes in {"writer": "{jobs:write,models:read}", "reader": "{models:read}"}.items():
            connection.execute(
                text("""INSERT INTO api_keys (id, tenant_id, digest, hint, scopes)
                    SELECT gen_random_uuid(), id, convert_to(:name, 'UTF8'), CAST(:name AS text),
                        CAST(:scopes AS text[])
                    FROM tenants"""),
                {"name": name, "scopes": scopes},
            )
    migrate(empty_database)

    with engine.connect() as connection:
        keys = {row.hint: row.scopes for row in connection.execute(text("SELECT hint, scopes FROM api_keys"))}

    assert keys == {"writer": ["jobs:write", "models:read", "models:write"], "reader": ["models:read"]}
