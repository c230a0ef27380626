"""What tests put into a house: objects, unfinished uploads, and rows that name objects; and how it is put in order."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import func

from shared.ids import public, uuid7
from shared.jobs.keys import artifact_key
from shared.jobs.rows import Dataset, DatasetState, Model, ModelVersion
from tests.worker.house import House

HOUR, DAY, MONTH = timedelta(hours=1), timedelta(days=1), timedelta(days=30)
NOW = func.clock_timestamp()


def put(house: House, key: str) -> str:
    house.storage.put(key, b"x", media_type="x/y")
    return key


def version(house: House, job_id: UUID, key: str) -> None:
    """A model version with these weights."""
    model_id = house.add(Model(tenant_id=house.tenant_id, name=uuid7().hex, latest=1))
    about = {"version": 1, "family": "vae", "spec": {}, "info": {}, "metrics": {}, "job_id": job_id}
    house.add(ModelVersion(model_id=model_id, weights={"key": key}, **about))


def dataset(house: House, **columns: Any) -> None:
    about = {"tenant_id": house.tenant_id, "name": "d", "state": DatasetState.READY, "source": {}}
    house.add(Dataset(**about | columns))


def begin_upload(house: House, key: str) -> None:
    client: Any = house.storage._client  # pyright: ignore[reportPrivateUsage]
    client.create_multipart_upload(Bucket=house.storage.bucket, Key=key)


def key_of(job_id: UUID, fence: int, name: str) -> str:
    return artifact_key(public("job", job_id), fence, name)


NAMES = [
    "lifetimes", "expired", "events", "usage", "announced", "bells", "idempotency_keys", "workers",
    "removed", "orphans", "uploads",
]  # fmt: skip


def put_in_order(house: House) -> None:
    """Twice, because some chores make work for others, and orphans are looked at twice."""
    for _ in range(2):
        for name in NAMES:
            house.chore(name).do()
