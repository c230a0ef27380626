"""Fixtures for ingestion: a Run over a folder, and files to feed it. Needs no server."""

import hashlib
import io
import json
import shutil
import struct
import wave
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from worker.data.dataset import ImageDataset, open_images
from worker.jobs.ingest import ingest
from worker.run import Assignment, StoredObject

DATASET_ID = "ds_" + "0" * 32
REAL_DATA = Path(__file__).parents[3] / "shared" / "data"

Files = Mapping[str, bytes]


@dataclass(kw_only=True)
class FolderRun:
    """A Run whose storage is a folder and whose user reads a list."""

    assignment: Assignment
    storage: Path
    device: str = "cpu"
    phases: list[str] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    stop_at: int | None = None

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def step(self, step: int, steps: int, **values: float) -> None:
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
        content = body.read_bytes()
        return StoredObject(key=name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))

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

    def run_job(content: bytes | Path, filename: str, **spec: Any) -> Ingested:
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
        run = FolderRun(assignment=assignment, storage=storage)
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


def png(pixels: Any, *, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an array or a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def greys(count: int, *, side: int = 8, seed: int = 0) -> list[bytes]:
    """Distinct grey PNG files."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)
    return [png(pixels) for pixels in noise]


def zipped(files: Files, **options: Any) -> bytes:
    """Make a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", options.pop("compression", zipfile.ZIP_DEFLATED), **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    """Make an ``.npz``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def wav(samples: Any, *, rate: int = 8000, width: int = 2, channels: int = 1) -> bytes:
    """Make a PCM WAV of little-endian samples that are already of the wanted width."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples if isinstance(samples, bytes) else np.asarray(samples, dtype="<i2").tobytes())
    return buffer.getvalue()


def huge_png() -> bytes:
    """A small PNG whose header declares ten billion pixels."""
    content = bytearray(png(np.zeros((8, 8))))
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zip_crc(bytes(content[12:29])))
    return bytes(content)


def zip_crc(content: bytes) -> int:
    """CRC-32, which PNG chunks and zip members share."""
    import zlib

    return zlib.crc32(content)
