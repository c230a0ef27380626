"""Every order in which clients that share an idempotency key are served, by API processes that die and lose answers.

The code of the API runs as it is, for each client on a connection of its own. It stops before each statement that takes
or looks up a key, and before each commit; an adversary decides who goes on, whose process dies before it commits, whose
commit is not answered, and who waits for another's key in vain. Whoever gets no answer asks again. What else a
transaction does nobody sees before its commit, a commit of nothing nobody sees at all, and a process that dies earlier
leaves no less. Of several clients that want the same, the first to begin is always the first named. Orders are not
remembered but gone, each from an empty database: what a transaction holds that has not ended could not be put back.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast

from sqlalchemy import Connection, Engine, Insert, Select, TextClause, text
from sqlalchemy.orm import Session

from api.crowd import Alone, Asked, _alone, accept_all
from api.parts import Parts
from api.submission import Accepted, accept
from api.views import Links
from shared.errors import IdempotencyInProgress, RequestRefused
from tests.model.operations import DATASET, SETTINGS, TENANT, request_for
from tests.model.violation import Violation

T = TypeVar("T")

KEY: Final = "k"
TAKE, LOOK, COMMIT = "INSERT key", "SELECT key", "COMMIT"
Manner = Literal["impatient"]
"""How a client's code goes on, if not as usual: with the error of a wait for a lock that took too long."""
_TRIES: Final = 4
"""Of a client, more than there are faults."""
_KEYS: Final = "idempotency_keys"
_EMPTY: Final = text(
    "WITH one AS (DELETE FROM outbox), two AS (DELETE FROM events), three AS (DELETE FROM idempotency_keys), "
    "four AS (DELETE FROM shares), five AS (DELETE FROM usage) DELETE FROM jobs"
)
_JOBS: Final = text("SELECT id FROM jobs ORDER BY id")
_HAS_WRITTEN: Final = text("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
_WAITED_IN_VAIN: Final = text(
    "DO $$ BEGIN RAISE EXCEPTION 'waited in vain' USING ERRCODE = 'lock_not_available'; END $$"
)
_IS_BLOCKED: Final = text("SELECT cardinality(pg_blocking_pids(:backend)) > 0")


@dataclass(frozen=True, kw_only=True)
class Client:
    """Asks with ``KEY`` until it is answered."""

    name: str = field(compare=False)
    steps: int = 2
    """Of the training that it asks for: other steps are another body."""
    times: int = 1
    """Requests that reach the process at once, and so are one crowd."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Who asks, after what, and what must become of it."""

    clients: tuple[Client, ...]
    orders: int
    """So many there are, unless the code stops elsewhere than it did."""
    before: Callable[[Parts], Coroutine[Any, Any, object]] | None = None
    faults: int = 1
    makes: int = 1
    """Jobs."""
    answers: frozenset[str] = frozenset({"202"})
    """Statuses and codes of errors of which every order gives each at least once, and no other."""


class Told(NamedTuple):
    """An answer."""

    how: str
    """The status, or the code of the error."""
    steps: int
    """What was asked for."""
    body: str


class _Turn:
    """Awaited where the code stops; tells what it was sent on with."""

    def __init__(self, before: str) -> None:
        self._before = before

    def __await__(self) -> Generator[str, Manner | None, Manner | None]:
        return (yield self._before)


def _stop_before(statement: Any) -> str | None:
    """What the stop before the statement is called, if there is one: before it takes or looks up a key."""
    if isinstance(statement, TextClause):
        return TAKE if statement.text.lstrip().startswith(f"INSERT INTO {_KEYS}") else None
    if isinstance(statement, Insert):
        return TAKE if str(statement.table) == _KEYS else None
    if isinstance(statement, Select):
        return LOOK if any(str(one) == _KEYS for one in statement.columns_clause_froms) else None
    return None


class _Session:
    """An ``AsyncSession`` of which each statement that matters waits for its turn."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.info = session.info

    async def execute(self, statement: Any, *args: Any, **how: Any) -> Any:
        await self._turn(statement)
        return self._session.execute(statement, *args, **how)

    async def scalar(self, statement: Any, *args: Any, **how: Any) -> Any:
        await self._turn(statement)
        return self._session.scalar(statement, *args, **how)

    async def scalars(self, statement: Any, *args: Any, **how: Any) -> Any:
        await self._turn(statement)
        return self._session.scalars(statement, *args, **how)

    async def run_sync(self, work: Callable[..., T], *args: Any) -> T:
        """It waits for nobody (``shared/jobs/needs.py``), so it is done in the same turn."""
        return work(self._session, *args)

    async def commit(self) -> None:
        if self._session.scalar(_HAS_WRITTEN):
            await _Turn(COMMIT)
        self._session.commit()

    async def _turn(self, statement: Any) -> None:
        before = _stop_before(statement)
        if before is not None and await _Turn(before) == "impatient":
            self._session.execute(_WAITED_IN_VAIN)


def through(code: Coroutine[Any, Any, T]) -> T:
    """What it returns if nobody interferes."""
    while True:
        try:
            code.send(None)
        except StopIteration as ended:
            return ended.value


class _Process:
    """``Parts`` as far as a submission needs them."""

    def __init__(self, connection: Connection) -> None:
        self.settings = SimpleNamespace(jobs=SETTINGS)
        self.relay = SimpleNamespace(wake=lambda *_: None)
        self._connection = connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[_Session]:
        with Session(self._connection, expire_on_commit=False) as session:
            served = _Session(session)
            yield served
            await served.commit()


def asked(client: Client) -> Asked:
    """Its request, as the route makes it."""
    request = request_for(DATASET, client.steps)
    how: Any = {"request": request, "body": request.model_dump(mode="json"), "idempotency_key": KEY}
    return Asked(tenant_id=TENANT, links=Links("http://api"), **how)


async def _serve(parts: Parts, client: Client) -> list[Told]:
    """As ``Crowd.submit``, which has an event loop besides."""
    new = asked(client)
    found = await accept_all(parts, [new] * client.times)
    return [_told(client, one if not isinstance(one, Alone) else await accept_alone(parts, new)) for one in found]


async def accept_alone(parts: Parts, new: Asked) -> Accepted | Exception:
    """The answer, or the refusal that is one."""
    try:
        return await accept(parts, new.links, _alone(parts, new))
    except IdempotencyInProgress:
        raise
    except RequestRefused as error:
        return error


def _told(client: Client, answer: Accepted | Exception) -> Told:
    if isinstance(answer, Accepted):
        return Told(str(int(answer.status)), client.steps, answer.body)
    if isinstance(answer, RequestRefused):
        return Told(answer.code, client.steps, "")
    raise answer


@dataclass
class _Served:
    """A client, and the code that serves it now, in a thread of its own: it may have to wait for somebody's lock."""

    client: Client
    connection: Connection
    thread: ThreadPoolExecutor
    told: list[Told] | None = None
    at: str = ""
    """What comes next, where it stops."""
    is_new: bool = True
    """Whether it has not gone on yet."""
    under_way: Future[None] | None = None
    _code: Coroutine[Any, Any, list[Told]] | None = None
    _tries: int = 0

    @property
    def is_ready(self) -> bool:
        return self.told is None and self.under_way is None

    def is_like_one_of(self, others: Sequence["_Served"]) -> bool:
        """Whether which of the two begins makes no difference."""
        return self.is_new and any(other.is_new and other.client == self.client for other in others)

    def begin(self) -> None:
        self._tries += 1
        if self._tries > _TRIES:
            raise Violation("every client is answered", f"{self.client.name} asked {_TRIES} times")
        self._code = _serve(cast(Parts, _Process(self.connection)), self.client)
        self.go_on()

    def act(self, how: Callable[["_Served"], None]) -> None:
        self.is_new = False
        self.under_way = self.thread.submit(how, self)

    def go_on(self, manner: Manner | None = None) -> None:
        assert self._code is not None
        try:
            self.at = self._code.send(manner)
        except StopIteration as ended:
            self.told = ended.value
        except IdempotencyInProgress:
            self.begin()

    def go_on_impatient(self) -> None:
        self.go_on("impatient")

    def go_on_unanswered(self) -> None:
        assert self._code is not None
        try:
            self._code.send(None)
        except StopIteration:
            self.begin()
        else:
            self.die()

    def die(self) -> None:
        self.leave()
        self.begin()

    def leave(self) -> None:
        """End what serves the client; its transaction ends with it."""
        if self._code is not None:
            self._code.close()
        self.connection.rollback()


class _Move(NamedTuple):
    """What the adversary can do."""

    one: _Served
    how: Callable[[_Served], None]
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.one.client.name}: {self.one.at}{self.fault}"


def _faults(one: _Served, served: Sequence[_Served]) -> Iterator[_Move]:
    if one.at == COMMIT:
        yield _Move(one, _Served.die, ", but dies before")
        yield _Move(one, _Served.go_on_unanswered, ", but gets no answer")
    if one.at == TAKE and any(other.at == COMMIT and other.told is None for other in served):
        yield _Move(one, _Served.go_on_impatient, ", but waits in vain")


class Explored(NamedTuple):
    """How much was gone through."""

    orders: int
    steps: int


class Orders:
    """All orders of one scene."""

    def __init__(self, engine: Engine, scene: Scene) -> None:
        self._scene = scene
        self._beside = engine.connect()
        self._connections = [engine.connect() for _ in scene.clients]
        self._threads = [ThreadPoolExecutor(1) for _ in scene.clients]

    def close(self) -> None:
        for connection in (self._beside, *self._connections):
            connection.close()
        for thread in self._threads:
            thread.shutdown()

    def run(self) -> Explored:
        """
        Raises:
            Violation: an order breaks a promise.
        """
        orders = steps = 0
        chosen: list[int] = []
        while True:
            widths = self._go(chosen)
            orders, steps = orders + 1, steps + len(widths)
            chosen += [0] * (len(widths) - len(chosen))
            while chosen and chosen[-1] + 1 == widths[len(chosen) - 1]:
                chosen.pop()
            if not chosen:
                return Explored(orders, steps)
            chosen[-1] += 1

    def _go(self, chosen: Sequence[int]) -> list[int]:
        """Go one way: ``chosen`` among the moves at each step, then always the first. Returns how many there were."""
        before = self._prepare()
        served = [
            _Served(client, connection, thread)
            for client, connection, thread in zip(self._scene.clients, self._connections, self._threads, strict=True)
        ]
        widths, trace, faults = list[int](), list[str](), self._scene.faults
        try:
            for one in served:
                one.begin()
            while moves := self._moves(served, faults):
                move = moves[chosen[len(widths)] if len(widths) < len(chosen) else 0]
                widths.append(len(moves))
                trace.append(str(move))
                faults -= move.fault != ""
                move.one.act(move.how)
                self._settle(served)
            self._judge(served, before)
        except Violation as broken:
            raise Violation(broken.promise, broken.what, trace) from None
        finally:
            self._abandon(served)
        return widths

    def _prepare(self) -> set[Any]:
        self._beside.execute(_EMPTY)
        self._beside.commit()
        if self._scene.before is not None:
            through(self._scene.before(cast(Parts, _Process(self._beside))))
        return self._jobs()

    def _jobs(self) -> set[Any]:
        jobs = set(self._beside.scalars(_JOBS))
        self._beside.rollback()
        return jobs

    def _moves(self, served: Sequence[_Served], faults: int) -> list[_Move]:
        """Faults last, so that a broken promise is found with few of them."""
        ready = [one for place, one in enumerate(served) if one.is_ready and not one.is_like_one_of(served[:place])]
        usual = [_Move(one, _Served.go_on) for one in ready]
        return usual + [move for one in ready if faults for move in _faults(one, served)]

    def _settle(self, served: Sequence[_Served]) -> None:
        """Until each has stopped or ended, or waits for the lock of one that has stopped."""
        while under_way := [one for one in served if one.under_way is not None]:
            # Whoever was found to wait may be let go by one that has ended since.
            if not any(self._has_come(one) for one in under_way) and any(one.is_ready for one in served):
                return

    def _has_come(self, one: _Served) -> bool:
        """Wait until it has stopped or ended; False if it waits for a lock."""
        assert one.under_way is not None
        backend = _backend(one.connection)
        while not wait([one.under_way], timeout=0.002).done:
            if self._is_blocked(backend):
                return False
        one.under_way.result()
        one.under_way = None
        return True

    def _is_blocked(self, backend: int) -> bool:
        return bool(self._beside.scalar(_IS_BLOCKED, {"backend": backend}))

    def _judge(self, served: Sequence[_Served], before: set[Any]) -> None:
        made = len(self._jobs() - before)
        told = [answer for one in served for answer in one.told or ()]
        if made != self._scene.makes:
            raise Violation("a key makes one job", f"{made} jobs were made, not {self._scene.makes}")
        if {answer.how for answer in told} != self._scene.answers:
            raise Violation("an answer is of its request", f"{sorted(answer.how for answer in told)}")
        accepted = [answer for answer in told if answer.how == "202"]
        if len({answer.body for answer in accepted}) > 1 or len({answer.steps for answer in accepted}) > 1:
            raise Violation("the answers to a key are equal", f"{accepted}")

    def _abandon(self, served: Sequence[_Served]) -> None:
        """Leave nothing under way. First those that others may wait for."""
        for one in sorted(served, key=lambda one: one.under_way is not None):
            if one.under_way is not None:
                with suppress(Violation):
                    one.under_way.result()
            one.leave()
        self._beside.rollback()


def _backend(connection: Connection) -> int:
    raw: Any = connection.connection.driver_connection
    return raw.info.backend_pid
