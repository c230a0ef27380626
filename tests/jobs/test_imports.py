"""The import job: a folder of diffusers becomes a model of ours with the same weights, and what is not is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file, save_file

from shared.errors import ModelLoadFailed
from shared.specs.diffusers_folder import CONFIG, WEIGHTS
from shared.specs.diffusers_scheduler import config_of
from shared.specs.diffusers_unet import fields_of
from shared.specs.diffusion import DiffusionSpec
from shared.specs.imports import ImportSpec
from shared.specs.unet import UNETS
from tests.families.test_diffusers_layout import filled
from tests.jobs.conftest import DATASET_ID
from tests.jobs.folder_run import FolderRun, put
from worker.engine.checkpoint import load_weights, read_tensors
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.export import export
from worker.jobs.imports import import_model
from worker.kernels.noise import Domain, Noise
from worker.run import Assignment, Stopped

FIELDS = {**fields_of(UNETS["s"]), "sample_size": 16, "in_channels": 1, "out_channels": 1, "num_class_embeds": 4}
KEYED = Noise.of_step(Domain.SAMPLING, 2, 0, range(3), torch.device("cpu"))
MakeRun = Callable[..., FolderRun]


def theirs(folder: Path) -> UNet2DModel:
    """A network of the library's own, saved by it."""
    net = filled(UNet2DModel(**FIELDS))
    net.save_pretrained(folder)
    return net


@pytest.fixture
def import_run(tmp_path: Path) -> MakeRun:
    """A run of an import job with the library's folder, whose weights ``spoil`` may change."""

    def make(*, spoil: Callable[[dict[str, Any]], object] = lambda tensors: None, fence: int = 1) -> FolderRun:
        theirs(folder := tmp_path / "theirs")
        tensors = load_file(folder / WEIGHTS)
        spoil(tensors)
        save_file(tensors, folder / WEIGHTS)
        info = {"format": "diffusers", "config": json.loads((folder / CONFIG).read_text()), "num_parameters": 10**6}
        info |= {"scheduler": config_of("v", 0.5), "sha256": "5" * 64}
        stored = put(tmp_path, "weights", (folder / WEIGHTS).read_bytes())
        dataset = {"id": DATASET_ID, "modality": "model", "digest": "6" * 64, "info": info}
        dataset["files"] = [{"name": WEIGHTS, **stored.as_json()}]
        wanted = ImportSpec.model_validate({"dataset": DATASET_ID, "model": "faces", "num_classes": 3})
        known = DiffusionSpec.imported(wanted, info)
        source = {"format": "diffusers", "dataset": DATASET_ID, "sha256": "5" * 64}
        model = {"family": "diffusion", "spec": known.spec.model_dump(mode="json", exclude_unset=True)}
        inputs = {"dataset": dataset, "model": model | {"info": {**known.info, "imported": source}}}
        spec = wanted.model_dump(mode="json")
        return FolderRun(
            folder=tmp_path, assignment=Assignment(job_id="job_1", fence=fence, type="import", spec=spec, inputs=inputs)
        )

    return make


def network(run: FolderRun, result: dict[str, Any]) -> Any:
    """Our own, of the weights that the job published."""
    model, family = run.assignment.inputs["model"], FAMILIES["diffusion"]
    net = build(family, family.spec.model_validate(model["spec"]), DataInfo.from_json(result["info"]))
    load_weights(run.folder / result["weights"]["key"], net)
    return net.eval()


def test_the_model_has_the_librarys_weights_and_outputs(import_run: MakeRun, tmp_path: Path) -> None:
    result = import_model(run := import_run())

    ours, net = network(run, result), theirs(tmp_path / "again")

    x, t, label = KEYED.normal(1, 16, 16), torch.tensor([3.0, 500, 900]), torch.arange(3)
    state = net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.network.state_dict().items())
    with torch.no_grad():
        expected = net(x, t, class_labels=label).sample
        assert (ours.network(x, t, label) - expected).abs().max() <= 1e-5 < 1e-3 * expected.std()


def test_it_is_exported_as_it_came(import_run: MakeRun, tmp_path: Path) -> None:
    result = import_model(run := import_run())
    model = {
        **run.assignment.inputs["model"],
        "id": "mdl_1",
        "name": "faces",
        "version": 1,
        "weights": result["weights"],
    }
    inputs = {"model": model, "dataset": run.assignment.inputs["dataset"]}
    wanted = {"model": "faces@1", "format": "diffusers"}
    back = FolderRun(
        folder=tmp_path, assignment=Assignment(job_id="job_2", fence=1, type="export", spec=wanted, inputs=inputs)
    )

    export(back)

    (folder := tmp_path / "out").mkdir()
    for artifact in back.artifacts("export"):
        (folder / artifact.name).write_bytes(back.body(artifact))
    came, left = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "out"))
    assert came.keys() == left.keys()
    assert all(torch.equal(came[name], left[name]) for name in came)
    card = (folder / "README.md").read_text()
    assert f"imported by Noisemill from files of diffusers (weights with the SHA-256 `{'5' * 64}`)" in card


def test_the_file_of_weights_tells_where_they_come_from(import_run: MakeRun) -> None:
    result = import_model(run := import_run())

    _, header = read_tensors(run.folder / result["weights"]["key"])

    assert header["info"]["imported"] == result["imported"] == result["info"]["imported"]
    assert (header["family"], header["step"]) == ("diffusion", 0)


def test_the_same_request_gives_the_same_bytes(import_run: MakeRun) -> None:
    first, second = (import_model(import_run(fence=fence)) for fence in (1, 2))

    assert first["weights"]["sha256"] == second["weights"]["sha256"]
    assert first["reproducibility"] == second["reproducibility"] == "exact"


SPOILT: dict[str, tuple[Any, str]] = {
    "missing": (lambda tensors: tensors.pop("conv_out.bias"), "1 are missing, the first is 'conv_out.bias'"),
    "extra": (lambda tensors: tensors.update(more=torch.zeros(1)), "1 belong to no layer"),
    "shape": (lambda tensors: tensors.update({"conv_out.bias": torch.zeros(2)}), r"conv_out.bias is \[2\], not \[1\]"),
    "type": (lambda tensors: tensors.update({"conv_out.bias": torch.zeros(1).double()}), "which float32 would round"),
    "NaN": (lambda tensors: tensors.update({"conv_out.bias": torch.tensor([torch.nan])}), "no finite number"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_weights_of_another_network_are_refused(import_run: MakeRun, how: str) -> None:
    spoil, message = SPOILT[how]
    run = import_run(spoil=spoil)

    with pytest.raises(ModelLoadFailed, match=message):
        import_model(run)

    assert run.published == []


def test_it_can_be_stopped(import_run: MakeRun) -> None:
    run = import_run()
    run.stop_at = (1, "cancel")

    with pytest.raises(Stopped):
        import_model(run)
