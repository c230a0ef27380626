"""Executes ``export`` jobs: a trained model as the files of another library, with a model card."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from shared.reproduction import EXACT
from shared.specs.export import ExportSpec
from worker.engine.checkpoint import load_weights, undrawn
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.card import CARD, model_card
from worker.jobs.inputs import stored
from worker.jobs.loaded import LoadedModel
from worker.run import Run

MEDIA_TYPES: Final = {".json": "application/json", ".md": "text/markdown"}


def export(run: Run) -> dict[str, Any]:
    """Write the model's files; equal requests give equal bytes.

    Raises:
        Stopped: on request.
        ModelLoadFailed: the weights are damaged, or of another network.
        OutOfMemory: they do not fit into memory.
    """
    run.phase("loading_model")
    wanted = ExportSpec.model_validate(dict(run.assignment.spec))
    model = run.assignment.inputs["model"]
    family, data = FAMILIES[model["family"]], DataInfo.from_json(model["info"])
    spec = family.spec.model_validate(model["spec"])
    LoadedModel.require_memory(model, torch.device("cpu"))
    with undrawn():
        net = build(family, spec, data)
    load_weights(run.fetch(stored(model["weights"])), net)
    run.phase("exporting")
    with tempfile.TemporaryDirectory(prefix="noisemill-") as scratch:
        folder = Path(scratch)
        usage = family.exports[wanted.format](folder, spec, net, data)
        del net
        digests = {path.name: _sha256(path) for path in folder.iterdir()}
        card = model_card(model, run.assignment.inputs["dataset"], wanted.format, usage, digests)
        (folder / CARD).write_bytes(card)
        files = _publish(run, folder)
    sha256 = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    return {"format": wanted.format, "files": files, "sha256": sha256, "reproducibility": EXACT}


def _publish(run: Run, folder: Path) -> dict[str, str]:
    """Upload every file; the SHA-256 of each by its name."""
    run.phase("uploading")
    paths, files = sorted(folder.iterdir()), dict[str, str]()
    for number, path in enumerate(paths, 1):
        media_type = MEDIA_TYPES.get(path.suffix, "application/octet-stream")
        files[path.name] = run.publish("export", path.name, path, media_type=media_type).sha256
        run.step(number, len(paths))
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
