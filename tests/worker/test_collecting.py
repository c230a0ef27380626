"""The collector among attempts that upload, record, lose their lease and finish: whatever the order of their steps, no
object that a committed row names is ever deleted, and in the end nothing else is left.

Nobody waits for anything here: objects are collected however young they are, in the round after they were marked.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, func, select
from sqlmodel import col

from shared.database import make_engine
from shared.ids import uuid7
from shared.jobs import attempts, claims, upkeep
from shared.jobs.attempts import Claim
from shared.jobs.keys import source_key
from shared.jobs.rows import Artifact, Dataset, DatasetState, Job
from shared.jobs.state import HELD, JobState, JobType
from shared.settings import S3Settings
from shared.storage import Listed, Storage, Stored
from tests.worker.house import TERMS, House
from tests.worker.interleaving import Interleaving

JOBS, WORKERS, ROUNDS = 3, 3, 5
NOW = func.clock_timestamp()


class Watched(Storage):
    """Storage whose calls take turns with everybody's, and which is asked to delete nothing that is named."""

    def __init__(self, settings: S3Settings, turns: Interleaving, house: House, engine: Engine) -> None:
        super().__init__(settings)
        self._turns, self._house, self._engine = turns, house, engine

    def put(self, key: str, body: Any, *, media_type: str, **how: Any) -> Stored:
        self._turns.pause()
        stored = super().put(key, body, media_type=media_type, **how)
        self._turns.pause()
        return stored

    def list(self, prefix: str, *, after: str = "") -> Iterator[Listed]:
        for listed in super().list(prefix, after=after):
            self._turns.pause()
            yield listed

    def delete(self, keys: Any) -> None:
        keys = [*keys]
        self._turns.pause()
        assert self._house.named(self._engine).isdisjoint(keys)
        super().delete(keys)


class Attempts:
    """What goes on in the house while it is cleaned, drawn at random."""

    def __init__(self, house: House, turns: Interleaving) -> None:
        self.house, self.turns, self.random = house, turns, turns.random

    def work(self) -> None:
        """A worker: attempts that end well, badly, or without a word; and go on although they were lost."""
        for _ in range(3):
            for claim in self.house.transact(
                lambda s: claims.claim(s, worker="w", queues=["train"], terms=TERMS, limit=1)
            ):
                self.attempt(claim)

    def attempt(self, claim: Claim) -> None:
        for step in range(self.random.randrange(4)):
            name = self.random.choice([f"checkpoint-{step}", f"preview-{step}"])
            made = self.house.upload(claim.job_id, claim.fence, name, step=step, keep=1)
            self.linger()
            if self.random.random() < 0.8:
                self.house.record(claim, made)
        self.random.choice([self.succeed, self.succeed, self.hand_back, self.vanish])(claim)

    def linger(self) -> None:
        """For as long as a collector may need to find, mark and delete what was uploaded."""
        for _ in range(self.random.choice([0, 40])):
            self.turns.pause()

    def succeed(self, claim: Claim) -> None:
        weights = self.house.upload(claim.job_id, claim.fence, "weights")
        files = [self.house.upload(claim.job_id, claim.fence, name) for name in ("card", "log")]
        about = {"key": weights.key, "sha256": weights.sha256, "size_bytes": weights.size_bytes}
        result = {"weights": about, "info": {}, "metrics": {}}
        listed = self.random.choice([files, [*files, weights]])
        self.linger()
        if self.house.succeed(claim, *listed, result=result) and self.random.random() < 0.5:
            self.house.change(Artifact, col(Artifact.job_id) == claim.job_id, removed_at=NOW)

    def hand_back(self, claim: Claim) -> None:
        self.house.upload(claim.job_id, claim.fence, "left")
        self.house.transact(lambda s: attempts.hand_back(s, claim.job_id, claim.fence))

    def vanish(self, claim: Claim) -> None:
        self.house.upload(claim.job_id, claim.fence, "lost")

    def reap(self) -> None:
        """Leases run out."""
        for _ in range(5):
            held = self.house.transact(lambda s: s.scalars(select(col(Job.id)).where(col(Job.state).in_(HELD))).all())
            if held:
                self.house.lose(self.random.choice(held))

    def announce(self) -> None:
        """Datasets that are uploaded straight to storage."""
        for _ in range(3):
            key = source_key(uuid7())
            about = {"tenant_id": self.house.tenant_id, "name": "d", "state": DatasetState.UPLOADING}
            self.house.add(Dataset(source={"key": key}, **about))
            self.house.storage.put(key, b"x", media_type="x/y")

    def collect(self) -> None:
        for _ in range(ROUNDS):
            for name in ("removed", "orphans"):
                self.house.chore(name).do()


@pytest.fixture(scope="module")
def house(module_database: str, module_s3: Any) -> Iterator[House]:
    house = House(module_database, module_s3)
    yield house
    house.engine.dispose()


@pytest.fixture
def watching(house: House) -> Iterator[Engine]:
    """An engine that takes no turns."""
    engine = make_engine(house.settings.database, "watching")
    yield engine
    engine.dispose()


def end_all(house: House) -> None:
    """No job is held any more, or ever will be."""
    house.change(Job, col(Job.state).in_(HELD), lease_until=NOW - TERMS.lease)
    house.transact(upkeep.reap)
    house.change(Job, col(Job.completed_at).is_(None), state=JobState.CANCELED, completed_at=NOW)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 30))])
def test_nothing_that_is_named_is_ever_deleted_and_nothing_else_is_left(
    house: House, watching: Engine, seed: int
) -> None:
    house.engine.dispose()
    house.engine = make_engine(house.settings.database, "turns")
    turns = Interleaving(seed, house.engine)
    house.storage = Watched(house.settings.s3, turns, house, watching)
    for _ in range(JOBS):
        house.job(JobType.TRAIN, spec={"model": "m", "family": "vae"}, max_attempts=100)
    life = Attempts(house, turns)
    for _ in range(WORKERS):
        turns.add("jobs", life.work)
    turns.add("jobs", life.reap)
    turns.add("datasets", life.announce)
    for _ in range(2):
        turns.add("collectors", life.collect)

    turns.run()
    assert house.named(watching) <= house.keys()
    end_all(house)
    life.collect()

    assert house.keys() == house.named(watching)
