"""A failover of the database, as its clients see it: sessions end, and new ones may only read for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg


@contextmanager
def read_only(url: str) -> Iterator[None]:
    """Nobody may write to this database, and whoever was connected to it is not any more."""
    # A session of its own setting, which changes the others'.
    options = "-c default_transaction_read_only=off"
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True, options=options) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        yield
        connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
