"""The page ``docs/model-check.md``: what is searched, what is promised, which seeded bugs are found and how."""

from collections.abc import Callable, Iterator
from typing import Any, Final

from sqlalchemy import Connection, Engine

from tests.model import invariants, sizes
from tests.model.keyed_scenes import BUGS, SCENES, go_through
from tests.model.mutants import MUTANTS, find
from tests.model.prepared import tuned
from tests.model.replay import TRACES
from tests.model.search import searching
from tests.model.violation import Violation

SEARCHES: Final = {
    "EVERYTHING": "all faults and all layers; two workers, two attempts",
    "OUTBOX": "the outbox alone: no redispatcher, no look into SQL, a broker that loses nothing",
    "DEADLINE": "a job that must start in time",
    "OUTAGES": "storage that is away again and again, longer than the job waits; one attempt may fail",
    "WORKERS": "a part of the first, for seeded bugs: workers, and a client who only waits",
    "REQUESTS": "another: one worker at a time, and all that a client may ask for",
}

INTRODUCTION: Final = """\
# The model check

Written by `python -m tests.model > docs/model-check.md`; every number below is of that run.

The functions of `shared/jobs` are the only code that changes a job. The search in `tests/model` runs them, as they
are, on a real PostgreSQL, in every order that an adversary can bring about for one job: there is no second
implementation that could be right where the product is wrong.

**What the adversary does.** It decides who acts next and who never does again. The relay succeeds, dies before it
sends or after, or its message is lost; a bell is delivered once, twice or never; idle workers look into SQL by
themselves. A worker claims, loses the answer and looks for its claim; uploads, sends heartbeats, records a checkpoint
and sends the record again when nobody confirmed it; succeeds, fails for now or for good, hands back, with or without
an answer, and dies anywhere. One that is stopped (SIGSTOP) makes no move while others do and the clock jumps past
every lease; when it goes on it acts with its old fence. The client cancels, pauses and resumes. Housekeeping reaps,
expires and rings again.

**What is left out, and why that is safe.** The fuse by which a worker kills itself, checks that only make an attempt
stop sooner, and waiting between tries: without them there are more orders, not fewer. Two messages in the broker are
as good as one that may be delivered again. Times count by class: over, not over, long ago; one jump passes every
bound. What a worker cannot observe (ids, texts, figures, versions) does not tell two states apart.

**Why it may be believed.** PostgreSQL executes an operation once for each state of the database and remembers what
came of it; {traces} random ways through what it remembers are gone again straight on PostgreSQL, with nothing
remembered, and compared at each step (`tests/model/replay.py`). That an operation may be taken for a single step is
tested by running every two of them at once on two connections: what comes of it is what one of the two orders gives
(`tests/model/test_atomicity.py`). And the search finds bugs, below.

**From every state the job ends.** Whatever happened, once the faults are over (holders dead, stopped processes sending
heartbeats with old fences, broker emptied) a single healthy worker ends the job, by the bell alone and by looking
into SQL alone.
"""

KEYS: Final = """\
## One job per idempotency key

A second search (`tests/model/keyed.py`) is of the way in. Clients that share a key are served by the code of the API,
each over a connection of its own; it stops before each statement that takes or looks up a key and before each commit,
and waits for real locks. The adversary decides who goes on. As a fault, of which an order has no more than its scene
allows, it kills a process before it commits, loses the answer to a commit, or lets somebody wait in vain for a key that
another holds; whoever is not answered asks again. In every order a key makes one job, its answers are equal to the
byte, another body is refused, a job that was erased is `gone`, and every client is answered.
"""


def page(connection: Connection) -> Iterator[str]:
    """Lines of Markdown, as the searches go."""
    yield INTRODUCTION.format(traces=TRACES)
    yield from _table("What is searched", ("rules", "what", *_COUNTS), _searches(connection))
    yield "A *world* is a state of the database together with the broker, storage, and what each worker believes.\n"
    yield from _table("What must hold", ("promise", "in words"), _promises())
    yield from _table(
        "Seeded bugs", ("bug", "rules", "broken promise", "shortest way there, from a new job"), _bugs(connection)
    )
    yield "A *(...)* names the operation in which the promise broke.\n"
    harmless = ((mutant.name, mutant.equivalent or "") for mutant in MUTANTS if mutant.equivalent)
    yield from _table("Changes that break no promise", ("change", "why"), harmless)
    yield KEYS
    engine = tuned(connection.engine.url, keeps_plans=False, pool_size=5)
    yield from _table("Orders of requests with one key", ("scene", "faults", "orders", "steps"), _scenes(engine))
    yield from _table("Seeded bugs of keys", ("bug", "scene", "broken promise", "a way there"), _key_bugs(engine))
    engine.dispose()


_COUNTS: Final = ("worlds", "transitions", "depth", "database_states", "executed")


def _searches(connection: Connection) -> Iterator[tuple[str, ...]]:
    for name, what in SEARCHES.items():
        with searching(connection, getattr(sizes, name)) as search:
            explored = search.run()
        yield name, what, *(f"{getattr(explored, count):,}" for count in _COUNTS)


def _promises() -> Iterator[tuple[str, str]]:
    judged: tuple[Callable[..., Any], ...] = (
        *invariants.STATES,
        *invariants.STEPS,
        invariants.only_the_current_attempt_writes,
        *invariants.WORLDS,
    )
    for promise in judged:
        yield promise.__name__.replace("_", " "), " ".join((promise.__doc__ or "").split())
    yield "every job ends", "Once the faults are over the job ends."
    yield "PostgreSQL refuses nothing", "No constraint of the schema is ever violated."


def _bugs(connection: Connection) -> Iterator[tuple[str, ...]]:
    named = {id(getattr(sizes, name)): name for name in SEARCHES}
    for mutant in MUTANTS:
        if mutant.equivalent is None:
            broken = find(connection, mutant)
            if broken is None:
                raise AssertionError(f"{mutant.name} is not found")
            yield mutant.name, named[id(mutant.rules)], broken.promise, "; ".join(broken.trace)


def _scenes(engine: Engine) -> Iterator[tuple[str, ...]]:
    for name, scene in SCENES.items():
        explored = go_through(engine, scene)
        yield name, str(scene.faults), f"{explored.orders:,}", f"{explored.steps:,}"


def _key_bugs(engine: Engine) -> Iterator[tuple[str, ...]]:
    for name, (plant, scene, _) in BUGS.items():
        try:
            go_through(engine, SCENES[scene], plant)
        except Violation as broken:
            yield name, scene, broken.promise, "; ".join(broken.trace)
        else:
            raise AssertionError(f"{name} is not found")


def _table(title: str, columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"| {' | '.join(column.replace('_', ' ') for column in columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |"
    yield ""
