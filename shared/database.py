"""Engines for PostgreSQL: one kind of pool, sync for workers and async for the API."""

import math
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import URL, Engine, ExceptionContext, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from shared.ahead import after, support
from shared.settings import DatabaseSettings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_FRESH_SECONDS: Final = 1.0

_LONGEST_REST: Final = timedelta(seconds=3)
"""After so long without a statement a transaction is ended by the server. But for the relay's, which asks for longer,
ours wait for nothing in between: whoever rests was stopped or cut off, and what it keeps locked others wait for, if
only for the account of their tenant."""

AWAY: Final = (OperationalError, InterfaceError, PoolTimeout)
"""What a statement raises while the database cannot be reached or written to, or asks to be tried again."""
_AWAY_STATES: Final = frozenset({"25006", "25P03", "25P04"})
"""SQLSTATEs that mean it, too, which psycopg takes for a fault of its user's: the server does not let anybody write (a
failover may lead to such a one), or it ended the session of a process that was stopped in the middle of a transaction.
"""

PLANNED_ONCE: Final = after((text("SET LOCAL plan_cache_mode = force_generic_plan"), {}))
"""Execution options of statements that take longer to plan than to run: until the end of the transaction, a connection
plans what it has prepared once, whatever the parameters are. By its estimate of costs alone PostgreSQL would plan each
time."""


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
            f" -c idle_in_transaction_session_timeout={_milliseconds(_LONGEST_REST)}",
        },
    }


def make_engine(
    settings: DatabaseSettings,
    application: str,
    *,
    ping: bool | Literal["rested"] = True,
    lock_timeout: timedelta | None = None,
) -> Engine:
    """A pooled engine for threads. ``ping`` each connection before use, unless the caller tries again by itself;
    ``rested``: those that were not used a moment ago.

    ``lock_timeout``: how long a statement waits for a row that somebody keeps locked, if not as long as it may run.
    """
    options = _options(settings, application, lock_timeout) | {"pool_pre_ping": ping is True}
    engine = create_engine(_url(settings), **options)
    if ping == "rested":
        _ping_when_rested(engine)
    support(engine)
    event.listen(engine, "handle_error", _as_away)
    return engine


def make_async_engine(settings: DatabaseSettings, application: str) -> "AsyncEngine":
    """A pooled engine for asyncio. Connections are pinged before use unless they were used a moment ago."""
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415  (workers start without)

    engine = create_async_engine(_url(settings), **_options(settings, application) | {"pool_pre_ping": False})
    _ping_when_rested(engine.sync_engine)
    support(engine.sync_engine)
    event.listen(engine.sync_engine, "handle_error", _as_away)
    return engine


def _as_away(context: ExceptionContext) -> OperationalError | None:
    """The one of ``AWAY`` that is raised instead of this error, if it says that the database is."""
    error = context.sqlalchemy_exception
    if not isinstance(error, DBAPIError) or isinstance(error, AWAY):
        return None
    if not context.is_disconnect and getattr(error.orig, "sqlstate", None) not in _AWAY_STATES:
        return None
    # A session that may only read stays so; a new one may find the server that others write to.
    context.is_disconnect = True
    return OperationalError(error.statement, error.params, error.orig or error, connection_invalidated=True)


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
