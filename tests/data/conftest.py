"""Fixtures for ingestion: a Run over a folder, and files to feed it. Needs no server."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from worker.data.dataset import ImageDataset, open_images
from worker.jobs.ingest import ingest
from worker.run import Assignment, Stopped, StoredObject

DATASET_ID = "ds_" + "0" * 32
REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


@dataclass(kw_only=True)
class FolderRun:
    """A Run whose storage is a folder and whose user reads a list."""

    assignment: Assignment
    storage: Path
    device: str = "cpu"
    phases: list[str] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    canceled: bool = False

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def step(self, step: int, steps: int, **values: float) -> None:
        if self.canceled:
            raise Stopped("cancel")
        self.steps.append((step, steps))

    def metrics(self, step: int, split: Literal["train", "held_out"], values: Mapping[str, float]) -> None:
        raise NotImplementedError("ingestion measures nothing")

    def log(self, message: str) -> None:
        raise NotImplementedError("ingestion says everything in its result")

    def publish(
        self, kind: str, name: str, body: bytes | Path, *, media_type: str, metadata: Mapping[str, Any] | None = None
    ) -> StoredObject:
        assert kind == "dataset" and isinstance(body, Path) and media_type
        shutil.copy(body, self.storage / name)
        with body.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return StoredObject(key=name, sha256=digest, size_bytes=body.stat().st_size)

    def fetch(self, stored: StoredObject) -> Path:
        return self.storage / stored.key


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What came of an ingestion."""

    result: dict[str, Any]
    files: dict[str, Path]
    run: FolderRun

    def images(self) -> ImageDataset:
        return open_images(self.files)


Ingest = Callable[..., Ingested]


@pytest.fixture
def ingest_upload(tmp_path: Path) -> Ingest:
    """Run the ingest job on some bytes: ``ingest_upload(content, "a.zip", resolution=8)``."""
    count = 0

    def run_job(content: bytes | Path, filename: str, *, canceled: bool = False, **spec: Any) -> Ingested:
        nonlocal count
        storage = tmp_path / f"storage-{(count := count + 1)}"
        storage.mkdir()
        if isinstance(content, Path):
            (storage / "source").symlink_to(content)
        else:
            (storage / "source").write_bytes(content)
        source = {"key": "source", "sha256": "-", "size_bytes": 0, "filename": filename}
        assignment = Assignment(
            job_id="job_1", fence=1, type="ingest", spec={"dataset": DATASET_ID, **spec}, inputs={"source": source}
        )
        run = FolderRun(assignment=assignment, storage=storage, canceled=canceled)
        result = ingest(run)
        files = {file["name"]: storage / file["key"] for file in result["files"]}
        return Ingested(result=json.loads(json.dumps(result)), files=files, run=run)

    return run_job


@pytest.fixture
def real_data() -> Path:
    """The folder of real data, which lies beside the repository and not in it."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}")
    return REAL_DATA
