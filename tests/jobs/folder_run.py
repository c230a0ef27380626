"""The second real implementation of ``worker.run.Run``: storage is a folder, and what is said is remembered."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import InputGone
from worker.code_cache import CodeCache
from worker.gathering import Gathering
from worker.run import Assignment, InputDamaged, Stopped, StopReason, StoredObject


def put(folder: Path, key: str, body: bytes) -> StoredObject:
    """Store ``body`` under ``key``."""
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return StoredObject(key=key, sha256=hashlib.sha256(body).hexdigest(), size_bytes=len(body))


@dataclass(frozen=True)
class Published:
    """One artifact."""

    kind: str
    name: str
    media_type: str
    metadata: Mapping[str, Any]
    stored: StoredObject


@dataclass
class FolderRun:
    """A run whose objects are files and whose reports are lists."""

    folder: Path
    assignment: Assignment
    device: str = "cpu"
    num_devices: int = 1
    """Processes that share a training."""
    gathering: Gathering = field(default_factory=Gathering)
    feature_networks: Path | None = None
    stop_at: tuple[int, StopReason] | None = None
    """Raise Stopped once this step is reported, or at the first boundary after it if the reason is ``preempt``."""
    before_publish: Callable[[str], None] = lambda kind: None
    """Called with the kind of each artifact before it is stored; may wait or raise."""
    phases: list[str] = field(default_factory=list)
    steps: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    measured: list[tuple[int, str, dict[str, float]]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    """Whether models were loaded already."""

    @property
    def devices(self) -> list[str]:
        return [self.device] * self.num_devices

    @property
    def code_cache(self) -> CodeCache:
        return CodeCache(self.folder / "code", limit_bytes=2**30)

    def found_model(self, *, was_loaded: bool) -> None:
        self.found.append(was_loaded)

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def step(self, step: int, steps: int, **values: float) -> None:
        self.steps.append((step, steps, json.loads(json.dumps(values, allow_nan=False))))
        if self.stop_at is not None and step >= self.stop_at[0] and self.stop_at[1] != "preempt":
            raise Stopped(self.stop_at[1])

    def boundary(self) -> None:
        if self.stop_at is not None and self.steps and self.steps[-1][0] >= self.stop_at[0]:
            raise Stopped(self.stop_at[1])

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self.measured.append((step, split, json.loads(json.dumps(values, allow_nan=False))))

    def log(self, message: str) -> None:
        self.logs.append(message)

    def publish(
        self, kind: str, name: str, body: bytes | Path, *, media_type: str, metadata: Mapping[str, Any] | None = None
    ) -> StoredObject:
        self.before_publish(kind)
        content = body if isinstance(body, bytes) else body.read_bytes()
        key = f"jobs/{self.assignment.job_id}/{self.assignment.fence}/{name}"
        assert key not in [artifact.stored.key for artifact in self.published], f"{key} was published before"
        stored = put(self.folder, key, content)
        self.published.append(Published(kind, name, media_type, json.loads(json.dumps(metadata or {})), stored))
        return stored

    def fetch(self, stored: StoredObject) -> Path:
        path = self.folder / stored.key
        if not path.exists():
            raise InputGone(f"no such object: {stored.key}")
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != stored.sha256:
            raise InputDamaged(f"SHA-256 {found}, expected {stored.sha256}")
        return path

    def artifacts(self, kind: str) -> list[Published]:
        return [artifact for artifact in self.published if artifact.kind == kind]

    def checkpoints(self) -> list[dict[str, Any]]:
        """What an assignment would find in ``inputs.resume``, newest first."""
        kept = self.artifacts("checkpoint")[::-1]
        return [artifact.stored.as_json() | {"step": artifact.metadata["step"]} for artifact in kept]

    def body(self, artifact: Published) -> bytes:
        return (self.folder / artifact.stored.key).read_bytes()


def store_array(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """Store a canonical dataset file; its entry in ``inputs.dataset.files``."""
    path = folder / "datasets" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return {"name": name, **put(folder, f"datasets/{name}", path.read_bytes()).as_json()}
