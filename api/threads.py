"""Code that was written for the event loop, run in a thread: each statement is waited for where it stands."""

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from api.parts import Parts

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ThreadParts(Parts):
    """The parts of the API for such code."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A session whose work is committed at the end, or not at all."""
        with Session(self.thread_engine, expire_on_commit=False) as session, session.begin():
            yield cast(AsyncSession, _Session(session))

    @asynccontextmanager
    async def statements(self) -> AsyncIterator[AsyncSession]:
        """A session whose statements stand for themselves, and so are one round trip each."""
        engine = self.thread_engine.execution_options(isolation_level="AUTOCOMMIT")
        with Session(engine, expire_on_commit=False) as session:
            yield cast(AsyncSession, _Session(session))


class _Session:
    """What that code uses of an ``AsyncSession``: every answer is there at once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.info = session.info

    async def execute(self, *args: Any, **how: Any) -> Any:
        return self._session.execute(*args, **how)

    async def scalar(self, *args: Any, **how: Any) -> Any:
        return self._session.scalar(*args, **how)


def run(code: Coroutine[Any, Any, T]) -> T:
    """What ``code`` returns, which waits for nothing but a session of ``ThreadParts``."""
    try:
        code.send(None)
    except StopIteration as ended:
        return ended.value
    code.close()
    raise RuntimeError("it waits for something that no thread can wait for")
