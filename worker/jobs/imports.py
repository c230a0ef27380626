"""Executes ``import`` jobs: a model that another library has written becomes one of ours, with the same weights."""

from typing import Any

import torch

from shared.reproduction import EXACT
from worker.engine.checkpoint import undrawn, weights_of
from worker.engine.estimate import require
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.inputs import fetch_files
from worker.jobs.weights import publish_weights
from worker.run import Run


def import_model(run: Run) -> dict[str, Any]:
    """Fill a network of the family with the uploaded weights, and publish it; the result is a model version.

    Raises:
        Stopped: on request.
        ModelLoadFailed: the weights are not those of the network that the upload describes.
        OutOfMemory: they do not fit into memory.
    """
    run.phase("loading_model")
    model, dataset = run.assignment.inputs["model"], run.assignment.inputs["dataset"]
    family, info = FAMILIES[model["family"]], model["info"]
    spec = family.spec.model_validate(model["spec"])
    # The network's weights, and the file's beside them.
    size_bytes = 4 * dataset["info"]["num_parameters"] + sum(file["size_bytes"] for file in dataset["files"])
    require(size_bytes, torch.device("cpu"), "the model and its file")
    files = fetch_files(run, dataset)
    with undrawn():
        net = build(family, spec, DataInfo.from_json(info))
    family.imports[dataset["info"]["format"]](files, spec, net)
    run.step(1, 1)
    run.phase("uploading")
    weights = publish_weights(run, weights_of(net), {**model, "step": 0})
    return {
        "metrics": {},
        "imported": info["imported"],
        "weights": weights.as_json(),
        "info": info,
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "reproducibility": EXACT,
    }
