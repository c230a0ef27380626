"""Everything around the database that the adversary plays with, and every move it may make.

A world is a state of the database, what lies in the broker and in storage, and what each worker's process believes.
Workers are dishonest only in time: they do what ``worker/watch.py`` does, but at any speed, and may die anywhere. A
stopped process (SIGSTOP) is one that makes no move while others do and the clock jumps; when it continues it acts
with its old fence. The fuse by which a real worker kills itself then is left out: promises must hold without it.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, get_args

from shared.errors import InternalError, UploadFailed
from tests.model.canonical import JUMP
from tests.model.database import Database, Operation, Refused
from tests.model.healing import Ways
from tests.model.operations import CHECKPOINT, WEIGHTS, Bounds, Crash, Operations, content_of

CRASHES: Final[tuple[Crash, ...]] = get_args(Crash)


class Worker(NamedTuple):
    """A process that holds an attempt, or believes so."""

    fence: int
    uploaded: bool = False
    """Whether its objects lie in storage."""


class Left(NamedTuple):
    """How often the adversary may still do what it could do for ever."""

    jumps: int = 2
    cancels: int = 1
    pauses: int = 1
    resumes: int = 1
    interruptions: int = 1
    outages: int = 0


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The size of the model, and which parts of the product take part in it."""

    heals_by: tuple[Ways, ...]
    """Each of these must suffice to end every job."""
    bounds: Bounds = field(default_factory=Bounds)
    left: Left = field(default_factory=Left)
    workers: int = 2
    poll: bool = True
    """Whether idle workers look into SQL by themselves, without a bell."""
    relay: bool = True
    redispatch: bool = True
    disturb: bool = True
    """Whether clients and housekeeping still try things once the job has ended."""
    losses: bool = True
    """Whether the broker may lose messages."""


class World(NamedTuple):
    """One state of the model."""

    database: int
    message: bool = False
    """Whether the broker holds a bell. More than one would be alike: each may be lost or delivered again."""
    workers: tuple[Worker, ...] = ()
    """Those that hold an attempt, or believe so; all others are idle and alike."""
    objects: tuple[tuple[str, str], ...] = ()
    """(key, SHA-256) of what lies in storage and is referred to, or may be."""
    left: Left = Left()
    cancel_acknowledged: bool = False
    reaper_read: bool = False
    """Whether a reaper has read that the lease ran out, and will act on that. The product's does both at once."""

    # Written out, because ``_replace`` takes several times as long, and there are so many.

    def at(self, database: int) -> "World":
        """This world with another state of the database."""
        return self if database == self.database else World(database, *self[1:])

    def of(self, workers: tuple[Worker, ...]) -> "World":
        """This world with other workers."""
        return World(self.database, self.message, workers, *self[3:])

    def holding(self, objects: tuple[tuple[str, str], ...]) -> "World":
        """This world with other objects in storage."""
        return World(*self[:3], objects, *self[4:])

    def differs(self, before: "World") -> bool:
        """Whether it is another one, but for how often the adversary may still do what."""
        return self[:4] != before[:4] or self[5:] != before[5:]


Move = tuple[str, World]


class Adversary:
    """The moves of each world."""

    def __init__(self, database: Database, operations: Operations, rules: Rules) -> None:
        self.database = database
        self.operations = operations
        self.rules = rules
        self._named_in: dict[int, frozenset[str]] = {}
        self._keys_of: dict[int, frozenset[str]] = {}
        self._referred_in: dict[Hashable, tuple[tuple[str, str], ...]] = {}

    def moves(self, world: World) -> Iterator[Move]:
        """Every move that changes the world, with the world afterwards."""
        for name, after in self._moves(world):
            if after.differs(world):
                yield name, self._essence(after)

    def _moves(self, world: World) -> Iterator[Move]:
        for index, worker in enumerate(world.workers):
            others = world.of(world.workers[:index] + world.workers[index + 1 :])
            for name, after in self._works(others, worker):
                yield f"attempt {worker.fence} {name}", after
        if not self._job(world)["completed_at"]:
            yield from self._relays(world)
            yield from self._claims(world)
            yield from self._requests(world)
            yield from self._upkeep(world)

    def _essence(self, world: World) -> World:
        """The world without objects that nothing refers to, and once the job has ended without what only leads to that.

        What others than its workers can do to a job that has ended is checked for each state of the database.
        """
        if world.objects:
            world = world.holding(self._referred(world))
        if self._job(world)["completed_at"]:
            return world._replace(message=False, left=Left(0, 0, 0, 0, 0, 0))
        return world

    def disturb_the_end(self, world: World) -> None:
        """Once the job has ended, do what clients and housekeeping might do, which must change nothing.

        Raises:
            Violation: it did.
        """
        if self.rules.disturb and self._job(world)["completed_at"]:
            do = self.operations
            for operation in (
                do.cancel(),
                do.pause(),
                do.resume(),
                do.reap(),
                do.expire(),
                do.redispatch(),
                do.relay(),
            ):
                self.database.apply(world.database, operation)

    def _job(self, world: World) -> Mapping[str, Any]:
        return self.database.rows(world.database)["jobs"][0]

    def _referred(self, world: World) -> tuple[tuple[str, str], ...]:
        """What lies in storage and is referred to, or may be."""
        where = world.database, world.workers, world.objects
        if where not in self._referred_in:
            named = self._named(world.database).union(*(self._keys(worker) for worker in world.workers))
            self._referred_in[where] = tuple(item for item in world.objects if item[0] in named)
        return self._referred_in[where]

    def _named(self, state: int) -> frozenset[str]:
        """Keys of the objects that rows name; asked so often that they are kept, like those below."""
        if state not in self._named_in:
            artifacts = self.database.rows(state)["artifacts"]
            self._named_in[state] = frozenset(row["key"] for row in artifacts if row["removed_at"] is None)
        return self._named_in[state]

    def _keys(self, worker: Worker) -> frozenset[str]:
        """Keys of the objects that an attempt makes."""
        if worker.fence not in self._keys_of:
            keys = frozenset(self.operations.key(worker.fence, name) for name in (CHECKPOINT, WEIGHTS))
            self._keys_of[worker.fence] = keys
        return self._keys_of[worker.fence]

    def _apply(self, world: World, operation: Operation) -> tuple[Hashable, World]:
        answer, after = self.database.apply(world.database, operation)
        return answer, world.at(after)

    # The relay. It is one transaction and locks the bells it has read; whatever others do between its reading and
    # its mark could as well happen after it, because nobody else changes a bell that is not sent.

    def _relays(self, world: World) -> Iterator[Move]:
        bells = self.database.rows(world.database)["outbox"]
        if not self.rules.relay or all(bell["sent_at"] is not None for bell in bells):
            return
        sent, after = self._apply(world, self.operations.relay())
        yield "relay", after._replace(message=world.message or bool(sent))
        if self.rules.losses:
            yield "relay, and the message is lost", after
        for crash in CRASHES if self._job(world)["state"] == "queued" else ():
            sent, after = self._apply(world, self.operations.relay(crash))
            yield f"relay dies {crash}", after._replace(message=world.message or bool(sent))

    # The beginning of an attempt.

    def _claims(self, world: World) -> Iterator[Move]:
        if len(world.workers) == self.rules.workers:
            return
        if world.message:
            yield self._claim("a bell is delivered", world._replace(message=False))
            yield self._claim("a bell is delivered, and will be again", world)
            if self.rules.losses:
                yield "the broker is emptied", world._replace(message=False)
        if self.rules.poll:
            yield self._claim("an idle worker looks", world)

    def _claim(self, why: str, world: World) -> Move:
        # Tokens are numbered like the claims that they are made for.
        claimed, after = self._apply(world, self.operations.claim(self._job(world)["fence"] + 1))
        if not isinstance(claimed, tuple):
            return f"{why}: nothing to claim", after
        return f"{why}: claimed as attempt {claimed[0]}", self._with(after, Worker(claimed[0]))

    # The life of an attempt. ``world`` is without its worker; a move that does not put it back is its last.

    def _works(self, world: World, worker: Worker) -> Iterator[Move]:
        yield "dies", world
        yield self._unless_over("sends a heartbeat", world, worker, self.operations.heartbeat(worker.fence))
        if worker.uploaded:
            recorded, after = self._apply(world, self.operations.record(worker.fence))
            yield "records a checkpoint", self._with(after, worker) if recorded else after
            if worker.fence == self._job(world)["fence"]:
                again = self.operations.record_twice(worker.fence)
                yield self._unless_over("records a checkpoint, unacknowledged, and again", world, worker, again)
        else:
            found, after = self._apply(world, self.operations.reclaim(worker.fence))
            yield "looks for its claim, unacknowledged", self._with(after, worker) if found else after
            objects = dict(world.objects) | dict.fromkeys(self._keys(worker), content_of(worker.fence))
            uploaded = world.holding(tuple(sorted(objects.items())))
            yield "uploads", self._with(uploaded, worker._replace(uploaded=True))
        ended = [(name, self._ends(world, operation)) for name, operation in self._endings(world, worker)]
        yield from ended
        for name, after in ended:
            # Not being told, it looks. When it does is all the same, since how an attempt ended never changes; and an
            # end that did not commit leaves the world as it was.
            over, seen = self._apply(after, self.operations.outcome_of(worker.fence))
            yield f"{name}, unacknowledged: looks", seen if over else self._with(seen, worker)

    def _unless_over(self, name: str, world: World, worker: Worker, operation: Operation) -> Move:
        answer, after = self._apply(world, operation)
        return name, after if isinstance(answer, Refused) else self._with(after, worker)

    def _endings(self, world: World, worker: Worker) -> Iterator[tuple[str, Operation]]:
        fence = worker.fence
        if worker.uploaded:
            yield "succeeds", self.operations.finish(fence)
        yield "fails, and may be tried again", self.operations.fail(fence, UploadFailed)
        yield "fails for good", self.operations.fail(fence, InternalError)
        if world.left.interruptions or self._job(world)["state"] != "running":
            yield "hands back", self.operations.hand_back(fence)
        if world.left.outages:
            yield "finds storage away", self.operations.postpone(fence)

    def _ends(self, world: World, operation: Operation) -> World:
        answer, after = self._apply(world, operation)
        if operation.name == "hand_back" and answer == "queued":
            after = after._replace(left=after.left._replace(interruptions=after.left.interruptions - 1))
        if operation.name == "postpone":
            after = after._replace(left=after.left._replace(outages=after.left.outages - 1))
        return after

    def _with(self, world: World, worker: Worker) -> World:
        return world.of(tuple(sorted((*world.workers, worker))))

    # The client.

    def _requests(self, world: World) -> Iterator[Move]:
        asked = (
            ("cancels", self.operations.cancel),
            ("pauses", self.operations.pause),
            ("resumes", self.operations.resume),
        )
        for what, request in asked:
            left: int = getattr(world.left, what)
            if left:
                state, after = self._apply(world, request())
                acknowledged = world.cancel_acknowledged or (what == "cancels" and state in ("canceling", "canceled"))
                after = after._replace(left=after.left._replace(**{what: left - 1}), cancel_acknowledged=acknowledged)
                yield f"the client {what}: {state}", after

    # Housekeeping. Each round is a single statement, and of two at once the second passes over the rows of the first.

    def _upkeep(self, world: World) -> Iterator[Move]:
        yield "reap", self._apply(world, self.operations.reap())[1]
        if self.rules.bounds.deadline:
            yield "expire", self._apply(world, self.operations.expire())[1]
        if self.rules.redispatch:
            yield "redispatch", self._apply(world, self.operations.redispatch())[1]
        if world.left.jumps:
            later = world.at(self.database.jump(world.database, JUMP))
            yield "the clock jumps", later._replace(left=later.left._replace(jumps=later.left.jumps - 1))
