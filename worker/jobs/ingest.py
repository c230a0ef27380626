"""The ingest job: an upload goes in, a canonical dataset comes out, and what was wrong is named."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared.reproduction import EXACT
from shared.specs.ingest import IngestSpec
from worker.data.progress import STEPS, Progress
from worker.data.upload import Wanted, convert
from worker.data.writing import Canonical
from worker.run import Run, StoredObject


def ingest(run: Run) -> dict[str, Any]:
    """Read the upload of an ingest job, convert it, publish the canonical files.

    Returns:
        ``modality``, ``count``, ``digest``, ``files`` [{name, key, sha256, size_bytes}], ``info``, ``reproducibility``
        and ``fingerprint``. The digest depends on the samples, their names' order and their annotations, not on the
        archive around them.

    Raises:
        DatasetInvalid: the upload cannot be read; the message names the file and the reason.
        Stopped: the job was asked to stop. Nothing is kept.
    """
    spec = IngestSpec.model_validate(run.assignment.spec)
    source: Mapping[str, Any] = run.assignment.inputs["source"]
    progress = Progress(run)
    progress.phase("fetching", 10)
    stored = StoredObject(key=source["key"], sha256=source["sha256"], size_bytes=source["size_bytes"])
    path = run.fetch(stored)
    with tempfile.TemporaryDirectory(prefix="noisemill-ingest-") as scratch:
        wanted = Wanted(modality=spec.modality, resolution=spec.resolution)
        canonical = convert(path, source["filename"], Path(scratch), wanted, progress)
        return _publish(run, canonical, progress)


def _publish(run: Run, canonical: Canonical, progress: Progress) -> dict[str, Any]:
    progress.phase("uploading", STEPS)
    files: list[dict[str, Any]] = []
    for name in progress.track(sorted(canonical.files)):
        media_type = "application/jsonl" if name.endswith(".jsonl") else "application/octet-stream"
        stored = run.publish("dataset", name, canonical.files[name], media_type=media_type)
        files.append({"name": name, **stored.as_json()})
    return {
        "modality": canonical.modality,
        "count": canonical.count,
        "digest": _digest(canonical.modality, files, canonical.info.get("classes")),
        "files": files,
        "info": dict(canonical.info),
        "reproducibility": EXACT,
        # Another release may decode a JPEG, or resize an image, otherwise.
        "fingerprint": {"pillow": version("pillow")},
    }


def _digest(modality: str, files: list[dict[str, Any]], classes: list[str] | None) -> str:
    content = [modality, [[file["name"], file["sha256"]] for file in files], classes]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
