"""Run by Alembic: connects, takes a lock, migrates in one transaction."""

from alembic import context
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool
from sqlmodel import SQLModel

import shared.jobs.alias_rows  # pyright: ignore[reportUnusedImport]  (defines tables, as the next do)
import shared.jobs.need_rows  # pyright: ignore[reportUnusedImport]
import shared.jobs.rows  # noqa: F401  # pyright: ignore[reportUnusedImport]

LOCK = 7_118_901_332_010_775
"""Key of the advisory lock that serializes migrations; any number that nobody else uses."""


def run() -> None:
    engine = create_engine(context.config.get_main_option("sqlalchemy.url") or "", poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        context.configure(connection=connection, target_metadata=SQLModel.metadata, transaction_per_migration=False)
        context.run_migrations()


run()
