"""One chaos run from start to verdict: an undisturbed run of each request, then faults under load, then the checks."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any, Final, Self

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from noisemill.client import Client
from tests.chaos.checker import Checker
from tests.chaos.history import History
from tests.chaos.load import Catalogue, Load, Ticket, plan, references, tells_versions
from tests.chaos.nemesis import Goals, Nemesis
from tests.chaos.recovery import Excuses
from tests.chaos.report import Report, judge
from tests.chaos.servers import Installation, Setup

logger = logging.getLogger(__name__)

_CALM_LIMIT: Final = 300.0
_HEALING_LIMIT: Final = 240.0
"""Seconds in which every job must have ended once nothing is broken any more."""
_FINAL: Final = "('succeeded', 'failed', 'canceled', 'expired')"
_ENDED: Final = text(f"""
    SELECT count(*) FROM jobs WHERE state IN {_FINAL} AND NOT EXISTS (SELECT FROM needs WHERE job_id = jobs.id)
""")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one run is to be."""

    setup: Setup
    jobs: int = 240
    goals: Goals = field(default_factory=Goals)
    limit: float = 3000.0
    """Seconds after which faults end whether or not the goals are met."""
    kinds: frozenset[str] | None = None
    """Kinds of orders; all when left out."""
    in_flight: int | None = None
    """Jobs that have not ended at any time; more than there are workers when left out."""


class Run:
    """The state of one run."""

    def __init__(self, wanted: Wanted, installation: Installation) -> None:
        self._wanted, self._installation = wanted, installation
        self._began = time.monotonic()
        self._engine = installation.engine()
        self._catalogue = Catalogue(wanted.setup.folder / "requests")
        self._references: dict[str, str] = {}
        self._ended = self._calm = 0
        self._digests: dict[str, Mapping[str, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.dispose()

    def go(self) -> Report:
        self._run_undisturbed()
        wiring, goals = self._installation.wiring, self._wanted.goals
        load = Load(wiring.api_url, wiring.api_key, self._catalogue)
        nemesis = Nemesis(self._installation, goals, self._wanted.setup.seed)
        load.start()
        nemesis.start()
        try:
            self._keep_busy(load, nemesis)
            nemesis.stop()
            logger.info("nothing is broken any more; %d of %d orders are placed", load.done, load.released)
            is_placed = load.finish(_HEALING_LIMIT)
            self._wait_for_the_end(_HEALING_LIMIT)
        finally:
            nemesis.close()
        complaints = [
            *load.complaints,
            *nemesis.failures,
            *([] if is_placed else ["a client still waits for its answer"]),
        ]
        if nemesis.progress < 1:
            complaints.append(f"the goals were not met: {nemesis.kills} kills, {nemesis.zombies} zombies")
        return self._judge(load, nemesis, complaints)

    def _run_undisturbed(self) -> None:
        wiring = self._installation.wiring
        with Client(wiring.api_url, wiring.api_key) as client:
            self._references = references(
                client,
                self._catalogue,
                lambda ids: [client.wait(one, _CALM_LIMIT) for one in ids],
                self._wanted.kinds,
            )
        self._calm, self._ended = self._count_ended(), 0
        history = History.read(self._engine, self._installation.s3.objects)
        jobs = {job.id.hex: job for job in history.jobs}
        self._digests = {
            name: history.result_of(jobs[job_id.partition("_")[2]], essential=tells_versions(name))
            for name, job_id in self._references.items()
        }
        logger.info(
            "the undisturbed run of %d requests took %.0f s", len(self._digests), time.monotonic() - self._began
        )

    def _keep_busy(self, load: Load, nemesis: Nemesis) -> None:
        """Release orders in step with the faults, and more of them while the goals are not met."""
        wanted, deadline = self._wanted, time.monotonic() + self._wanted.limit
        orders = plan(self._catalogue, wanted.jobs, wanted.setup.seed, wanted.kinds)
        told = 0.0
        while (
            time.monotonic() < deadline
            and not nemesis.failures
            and (load.released < wanted.jobs or nemesis.progress < 1)
        ):
            for order in islice(orders, self._room(load, nemesis.progress)):
                load.release(order)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                self._tell(load, nemesis)
            time.sleep(0.25)

    def _room(self, load: Load, progress: float) -> int:
        """How many orders may be released now: workers have enough to do, and the queue is never deep."""
        wanted = self._wanted
        least = most = wanted.in_flight
        if least is None or most is None:
            least, most = wanted.setup.workers + 1, 3 * wanted.setup.workers
        is_behind = load.released < wanted.jobs * progress
        return max(0, (most if is_behind else least) - (load.released - self._count_ended()))

    def _count_ended(self) -> int:
        """Of the orders: a chain counts as its first job does, so that workers have enough to do while others wait."""
        with suppress(SQLAlchemyError), self._engine.begin() as connection:
            self._ended = connection.execute(_ENDED).scalar_one() - self._calm
        return self._ended

    def _wait_for_the_end(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            with suppress(SQLAlchemyError), self._engine.begin() as connection:
                if not connection.execute(text(f"SELECT count(*) FROM jobs WHERE state NOT IN {_FINAL}")).scalar_one():
                    return
            time.sleep(0.5)

    def _tell(self, load: Load, nemesis: Nemesis) -> None:
        logger.info(
            "%4.0f s: %d of %d jobs ended, %d kills, %d zombies, %d%%",
            *(time.monotonic() - self._began, self._count_ended(), load.released),
            *(nemesis.kills, nemesis.zombies, 100 * nemesis.progress),
        )

    def _judge(self, load: Load, nemesis: Nemesis, complaints: Sequence[str]) -> Report:
        history = History.read(self._engine, self._installation.s3.objects)
        calm = [
            Ticket(job_id=job_id, request=name, ends=frozenset({"succeeded"}))
            for name, job_id in self._references.items()
        ]
        checker = Checker(history, [*calm, *load.tickets], self._digests)
        self._keep(nemesis, history)
        self._installation.collect()
        collected = Checker(History.read(self._engine, self._installation.s3.objects), [], {})
        return judge(
            checker,
            nemesis.faults,
            Excuses(nemesis.lookout.looks, timedelta(seconds=self._wanted.setup.lease)),
            [*complaints, *collected.left_over(), *collected.objects()],
            seed=self._wanted.setup.seed,
            jobs=len(load.tickets),
            faults=nemesis.counts(),
            kills=nemesis.kills,
            restarts=dict(self._installation.restarts()),
            commit_lies=dict(self._installation.database_proxy.lies),
            s3_faults=dict(self._installation.s3.faults.hits),
            duration_s=round(time.monotonic() - self._began, 1),
        )

    def _keep(self, nemesis: Nemesis, history: History) -> None:
        """Beside the logs, for whoever looks into a failed run."""
        tables: Mapping[str, Sequence[Any]] = {
            "faults": nemesis.faults, "jobs": history.jobs, "attempts": history.attempts, "events": history.events,
            "artifacts": history.artifacts, "looks": nemesis.lookout.looks,
        }  # fmt: skip
        for name, rows in tables.items():
            lines = (json.dumps({k: v for k, v in vars(row).items() if k[0] != "_"}, default=str) for row in rows)
            (self._wanted.setup.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def run(wanted: Wanted) -> Report:
    """Start everything, do all of it, and end every process."""
    installation = Installation(wanted.setup)
    with installation.running(), Run(wanted, installation) as chaos:
        report = chaos.go()
    for data in ("postgres", "valkey", "cache", "s3"):  # what they held is in the history
        shutil.rmtree(wanted.setup.folder / data, ignore_errors=True)
    report.write(wanted.setup.folder / "report.json")
    return report
