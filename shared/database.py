"""Engines for PostgreSQL: one kind of pool, sync for workers and async for the API."""

import math
import time
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import InterfaceError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from shared.settings import DatabaseSettings

_FRESH_SECONDS: Final = 1.0

AWAY: Final = (OperationalError, InterfaceError, PoolTimeout)
"""What a statement raises while the database cannot be reached, or asks to be tried again."""


def _url(settings: DatabaseSettings) -> URL:
    """The URL with our driver, whichever PostgreSQL driver it named."""
    return make_url(settings.url.get_secret_value()).set(drivername="postgresql+psycopg")


def _milliseconds(duration: timedelta) -> int:
    return int(duration.total_seconds() * 1000)


def _options(settings: DatabaseSettings, application: str, lock_timeout: timedelta | None = None) -> dict[str, object]:
    timeout = _milliseconds(settings.statement_timeout)
    patience = timeout if lock_timeout is None else _milliseconds(lock_timeout)
    return {
        "pool_size": settings.pool_size,
        "max_overflow": 0,
        "pool_timeout": settings.pool_timeout.total_seconds(),
        "pool_pre_ping": True,
        "pool_use_lifo": True,
        "connect_args": {
            "application_name": application,
            "connect_timeout": 5,
            # A server that vanished without a word is noticed in about ten seconds.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
            # Short statements: compiling one (jit) takes longer than running it.
            "options": f"-c timezone=UTC -c jit=off -c statement_timeout={timeout} -c lock_timeout={patience}"
            " -c idle_in_transaction_session_timeout=20000",
        },
    }


def make_engine(
    settings: DatabaseSettings, application: str, *, ping: bool = True, lock_timeout: timedelta | None = None
) -> Engine:
    """A pooled engine for threads. ``ping`` each connection before use, unless the caller tries again by itself.

    ``lock_timeout``: how long a statement waits for a row that somebody keeps locked, if not as long as it may run.
    """
    return create_engine(_url(settings), **_options(settings, application, lock_timeout) | {"pool_pre_ping": ping})


def make_async_engine(settings: DatabaseSettings, application: str) -> AsyncEngine:
    """A pooled engine for asyncio. Connections are pinged before use unless they were used a moment ago."""
    engine = create_async_engine(_url(settings), **_options(settings, application) | {"pool_pre_ping": False})
    _ping_when_rested(engine.sync_engine)
    return engine


def _ping_when_rested(engine: Engine) -> None:
    """``pool_pre_ping``, without its round trip where requests follow each other closely."""

    def rests(_connection: Any, record: Any) -> None:
        record.info["rests_since"] = time.monotonic()

    def is_wanted(connection: Any, record: Any, _fairy: Any) -> None:
        if time.monotonic() - record.info.get("rests_since", math.inf) < _FRESH_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            # The pool then makes a new one of this, and of all that are as old.
            raise InvalidatePoolError from error

    event.listen(engine, "checkin", rests)
    event.listen(engine, "checkout", is_wanted)
