"""The models and feature networks that a spec names, untrained and stored: for tests of every family, whatever it
begins with."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from shared.specs import FAMILIES as SPECS
from shared.specs.training import TrainSpec
from tests.jobs.folder_run import put
from worker.engine.checkpoint import write_weights
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Origin


def origins(folder: Path, spec: TrainSpec, data: DataInfo) -> dict[str, Any]:
    """The ``models`` of an assignment that trains ``spec`` on ``data``; each is the default of the family that its name
    is, or of the first one that will do."""
    named = {field: (ref.partition("@")[0], families) for field, (ref, families) in spec.references().items()}
    chosen = {field: name if name in families else min(families) for field, (name, families) in named.items()}
    return {field: _origin(folder, field, family, data) for field, family in chosen.items()}


def feature_networks(folder: Path, spec: TrainSpec, data: DataInfo) -> None:
    """Write what an operator would have put into ``folder``, with random weights."""
    names = spec.feature_networks()
    net = build(FAMILIES[spec.model_dump()["family"]], spec, data) if names else None
    for part, name in names.items():
        folder.mkdir(exist_ok=True)
        save_file(net.get_submodule(part).state_dict(), folder / f"{name}.safetensors")


def _origin(folder: Path, field: str, family: str, data: DataInfo) -> dict[str, Any]:
    spec = SPECS[family].model_validate({"family": family, "dataset": "ds_" + "0" * 32, "model": field, "seed": 7})
    path = folder / f"{field}.safetensors"
    write_weights(path, build(FAMILIES[family], spec, data), {})
    stored = put(folder, f"models/{field}", path.read_bytes())
    described = Origin(family=family, spec=spec.model_dump(mode="json"), data=data)
    return {"name": field, "version": 1, "weights": stored.as_json()} | described.as_json()
