"""A model version on the device: its network, kept warm between jobs, and what it needs to be asked something."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shared.specs.tasks import OPTIONS, Request
from shared.specs.training import TrainSpec
from worker.engine.checkpoint import load_weights
from worker.engine.models import MODELS
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.inputs import stored
from worker.run import Run


class LoadedModel:
    """A model version on the device."""

    def __init__(self, fields: Mapping[str, Any], net: nn.Module, spec: TrainSpec, data: DataInfo) -> None:
        self.name = f"{fields['name']}@{fields['version']}"
        self.sha256: str = fields["weights"]["sha256"]
        self.family = FAMILIES[fields["family"]]
        self.net, self.spec, self.data = net, spec, data

    @classmethod
    def load(cls, run: Run, fields: Mapping[str, Any], device: torch.device) -> "LoadedModel":
        family = FAMILIES[fields["family"]]
        spec = family.spec.model_validate(fields["spec"])
        data = DataInfo.from_json(fields["info"])

        def load() -> nn.Module:
            net = build(family, spec, data)
            load_weights(run.fetch(stored(fields["weights"])), net)
            return net.requires_grad_(requires_grad=False).eval().to(device)

        # The same weights may be described in another way, which makes another network of them.
        key = (fields["weights"]["sha256"], spec.model_dump_json(), json.dumps(data.as_json()), str(device))
        return cls(fields, MODELS.get(key, load), spec, data)

    def sampler(self, task: str) -> Any:
        return self.family.tasks[task](self.spec, self.data)

    def recipe(self, request: Request) -> dict[str, Any]:
        """What the bytes of a sample depend on, and how to ask for it again; nothing of the job."""
        meaningless = OPTIONS - self.spec.tasks[request.task]
        elsewhere = {"model", "task", "seed", "num_samples", "num_pairs"}
        parameters = request.model_dump(mode="json", exclude=elsewhere | meaningless)
        return {
            "model": self.name,
            "weights_sha256": self.sha256,
            "task": request.task,
            "parameters": parameters,
            "seed": request.seed,
        }
