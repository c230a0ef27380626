"""Executes ``reaverage`` jobs: the weights of a finished training, averaged over another length, as a new version."""

from typing import Any

import torch

from shared.specs.reaverage import ReaverageSpec
from worker.engine.averages import averaged
from worker.engine.checkpoint import fill, weights_of
from worker.engine.numerics import exact, fingerprint
from worker.engine.sampling import REPRODUCIBILITY
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.inputs import stored
from worker.jobs.weights import publish_weights
from worker.run import Run


def reaverage(run: Run) -> dict[str, Any]:
    """Combine the copies that a training made; equal requests give equal bytes.

    Raises:
        Stopped: on request.
        ModelLoadFailed: the copies are damaged, or of another network.
    """
    run.phase("loading_model")
    spec = ReaverageSpec.model_validate(dict(run.assignment.spec))
    model = run.assignment.inputs["model"]
    family, info = FAMILIES[model["family"]], {**model["info"], "ema_length": spec.ema_length}
    trained = family.spec.model_validate(model["spec"])
    path = run.fetch(stored(run.assignment.inputs["averages"]))
    run.phase("averaging")
    with exact(), torch.no_grad():
        state, fit = averaged(path, length=spec.ema_length)
        net = build(family, trained, DataInfo.from_json(model["info"]))
        computed_by = fingerprint(torch.device("cpu"))
        fill(net.state_dict(), state, path.name)
    run.step(1, 1)
    run.phase("uploading")
    description = {"family": model["family"], "spec": trained.model_dump(mode="json"), "info": info}
    weights = publish_weights(run, weights_of(net), description | {"step": trained.steps})
    return {
        "metrics": {},
        "ema_length": spec.ema_length,
        "profile_error": fit.error,
        "averaged_from": f"{model['name']}@{model['version']}",
        "weights": weights.as_json(),
        "info": info,
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "reproducibility": REPRODUCIBILITY,
        "fingerprint": computed_by,
    }
